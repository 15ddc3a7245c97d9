"""The data sets inside the scikit-learn package: handwritten digits, and two tables of measurements."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import datasets
from torch import Tensor

from hpc_c2g.data.choose import relabel, split_pool
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.dataset import Dataset, Split

TABLE_RANGE = (-5.0, 5.0)


def load_digits(config: DataConfig) -> Split:
    """1797 digits ``[1, 8, 8]``, pixels in 0..1 (the 17 gray levels divided by 16).

    Raises:
        UserError: sizes or classes that the data set does not have.
    """
    bunch = datasets.load_digits()
    labels, names = relabel(bunch.target.astype(np.int64), [str(c) for c in range(10)], config)
    samples = torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1)
    train, held = split_pool(labels, names, config)
    return Split(
        *(
            Dataset(samples[indices], torch.from_numpy(labels[indices]), names, (0.0, 1.0))
            for indices in (torch.from_numpy(train), torch.from_numpy(held))
        )
    )


def load_table(config: DataConfig) -> Split:
    """``breast_cancer`` (569 rows of 30 features, 2 classes) or ``wine`` (178 rows of 13 features, 3 classes).

    The features have units that differ by 1e5, so the raw values are standardised: mean and standard deviation per
    feature are those of the *train part* (a constant feature is only centered), so nothing of the held-out rows enters
    the train part. Both parts are then clipped to -5..5, which the box of a generator can hold.

    Raises:
        UserError: sizes or classes that the data set does not have.
    """
    bunch = {"breast_cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}[config.name]()
    labels, names = relabel(bunch.target.astype(np.int64), [str(name) for name in bunch.target_names], config)
    rows: NDArray[np.float64] = bunch.data
    train, held = split_pool(labels, names, config)
    mean, deviation = rows[train].mean(axis=0), rows[train].std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)

    def standardised(indices: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(((rows[indices] - mean) / scale).clip(*TABLE_RANGE)).float()

    return Split(
        *(
            Dataset(standardised(indices), torch.from_numpy(labels[indices]), names, TABLE_RANGE)
            for indices in (train, held)
        )
    )
