"""Similarity of two tables of measurements, column by column and in pairs of columns (samples ``[N, d]``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp
from torch import Tensor

Table = NDArray[np.float64]


def marginal_distance(samples: Tensor, train: Tensor) -> float | None:
    """Return the Kolmogorov-Smirnov distance of a column's two distributions, 0 to 1, mean over columns; None unless they are rows.

    Args:
        samples: Generated rows ``[N, d]``.
        train: Training rows ``[n, d]``.
    """
    if samples.ndim != 2:
        return None
    ours, theirs = samples.double().numpy(), train.double().numpy()
    distances = [ks_2samp(a, b, method="asymp").statistic for a, b in zip(ours.T, theirs.T, strict=True)]
    return float(np.mean(distances))


def correlation_distance(samples: Tensor, train: Tensor) -> float | None:
    """Return the difference of two columns' correlation, 0 to 2, mean over pairs; None unless they are rows of at least two columns.

    A column that does not vary has correlation 0 with every other one.
    """
    if samples.ndim != 2 or samples.shape[1] < 2:
        return None
    ours, theirs = _correlations(samples.double().numpy()), _correlations(train.double().numpy())
    pairs = np.triu_indices(len(ours), k=1)
    return float(np.abs(ours - theirs)[pairs].mean())


def _correlations(rows: Table) -> Table:
    centered = rows - rows.mean(0)
    lengths = np.linalg.norm(centered, axis=0)
    whole: Table = centered.T @ centered / np.maximum(np.outer(lengths, lengths), np.finfo(float).tiny)
    return whole
