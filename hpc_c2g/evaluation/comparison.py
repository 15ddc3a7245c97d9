"""Generated samples beside the real data that they are compared with, and the distances that several metrics share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hpc_c2g.data.choose import even_shares
from hpc_c2g.data.dataset import Dataset, flat_rows
from hpc_c2g.evaluation.oracle import Oracle, svc_oracle

TRANSFER_SAMPLES = 1000
"""Largest number of samples that the SVC of ``transfer_accuracy`` is fitted to."""

PAIR_SAMPLES = 500
"""Largest number of samples of a class whose pairs enter ``diversity``: 124 750 pairs."""

CANDIDATES = 5
"""Number of nearest images that are kept: the SSIM of all pairs would cost far more."""

BLOCK = 1024
"""Rows of a distance matrix that are held at once."""


@dataclass(frozen=True)
class Comparison:
    """Generated samples and the real data that they are compared with; distances are computed once, when a metric needs them.

    Attributes:
        generated: Generated samples ``[N, *S]`` in raw units on the host, with the labels that they were generated as.
        train: Data that the classifier was fitted to.
        oracle: Independent classifier that ``oracle_accuracy`` uses.
        test_half: Held-out data that the SVC of ``transfer_accuracy`` is tested on.
        real: Held-out data that distances are compared with.
        seed: Seed of the random choices if there are too many samples.
    """

    generated: Dataset
    train: Dataset
    oracle: Oracle
    test_half: Dataset
    real: Dataset
    seed: int

    @cached_property
    def to_train(self) -> tuple[Tensor, Tensor]:
        """Distance ``[N]`` of each sample to its nearest training image, and indices of its nearest ones."""
        return nearest(self._points, self._train_points, CANDIDATES)

    @cached_property
    def to_sample(self) -> tuple[Tensor, Tensor]:
        """Distance ``[n]`` of each training image to its nearest sample, and indices of its nearest ones."""
        return nearest(self._train_points, self._points, CANDIDATES)

    @cached_property
    def train_to_real(self) -> Tensor:
        """Distance ``[n]`` of each training image to its nearest held-out image."""
        return nearest(self._train_points, flat_rows(self.real.samples))[0]

    @cached_property
    def real_to_train(self) -> Tensor:
        """Distance of each held-out image to its nearest training image."""
        return nearest(flat_rows(self.real.samples), self._train_points)[0]

    @cached_property
    def real_to_sample(self) -> tuple[Tensor, Tensor]:
        """Distance of each held-out image to its nearest sample, and indices of its nearest ones."""
        return nearest(flat_rows(self.real.samples), self._points, CANDIDATES)

    @cached_property
    def _points(self) -> Tensor:
        return flat_rows(self.generated.samples)

    @cached_property
    def _train_points(self) -> Tensor:
        return flat_rows(self.train.samples)


def within_class_median(data: Dataset, seed: int) -> float | None:
    """Median distance over all pairs of one class, pooled over the classes; None if there is no pair.

    For a class with more than ``PAIR_SAMPLES`` samples, a random choice of ``PAIR_SAMPLES`` is used.
    """
    pairs = []
    for c in range(len(data.classes)):
        points = flat_rows(data.samples[data.labels == c])
        if len(points) > PAIR_SAMPLES:
            points = points[np.random.default_rng([seed, 1, c]).permutation(len(points))[:PAIR_SAMPLES]]
        pairs.append(torch.pdist(points))
    pooled = torch.cat(pairs)
    return median(pooled) if len(pooled) else None


def svc_accuracy(fit: Dataset, test: Dataset) -> float:
    """Accuracy on ``test`` of an SVC (Gaussian kernel of scikit-learn's default width, C = 10) fitted to ``fit``."""
    return agreement(svc_oracle(fit), test)


def agreement(oracle: Oracle, data: Dataset) -> float:
    """Share of the data's labels that the oracle agrees with."""
    return float((oracle(data.samples) == data.labels).double().mean())


def nearest(queries: Tensor, references: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Distance ``[n]`` to the nearest reference, and indices ``[n, count]`` of the nearest ones, nearest first.

    Args:
        queries: Points ``[n, d]`` in float64.
        references: Points ``[m, d]`` in float64.
        count: Number of indices; m if there are fewer references.
    """
    count = min(count, len(references))
    indices = torch.empty(len(queries), count, dtype=torch.int64)
    squares = references.square().sum(dim=1)
    for rows in blocks(len(queries)):
        # The query's own square is left out, because it does not change the order.
        indices[rows] = (squares - 2 * queries[rows] @ references.T).topk(count, largest=False).indices
    # Recomputed from the difference: the expanded square would not be 0 for equal points.
    chunks = [(queries[rows] - references[indices[rows, 0]]).norm(dim=1) for rows in blocks(len(queries))]
    return torch.cat(chunks), indices


def blocks(count: int, size: int | None = None) -> list[slice]:
    """Slices of ``size`` rows (``BLOCK`` if None) that cover ``count`` rows."""
    size = size or BLOCK
    return [slice(start, start + size) for start in range(0, count, size)]


def first_per_class(data: Dataset, most: int) -> Dataset:
    """First samples of every class, the same number of each, ``most`` in total."""
    shares = even_shares(most, len(data.classes))
    return data.subset(torch.cat([(data.labels == c).nonzero()[:share, 0] for c, share in enumerate(shares)]))


def median(values: Tensor) -> float:
    """Median: the mean of the two middle values where their number is even (torch takes the lower one)."""
    return float(np.median(values.numpy()))


def ratio(value: float | None, real: float | None) -> float | None:
    """``value`` over ``real``; None if one of them is missing or ``real`` is 0."""
    return value / real if value is not None and real else None
