"""The metrics of generated samples, computed with real data that the generator never saw; see ``metric_registry`` for their list.

Everything here *uses real data*: it is for your own classifiers only, and generator training never sees a result of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_c2g.data.dataset import Dataset, Split, flat_rows
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation.comparison import Comparison, nearest, ratio
from hpc_c2g.evaluation.metric_registry import METRICS
from hpc_c2g.evaluation.oracle import Oracle, oracle_of


def judge(samples: Tensor, labels: Tensor, split: Split, seed: int = 0, oracle: Oracle | None = None) -> dict[str, Any]:
    """Return all metrics of generated samples by name; see ``metric_registry``.

    Every value is a float, ``ssim_sample_to_train`` and ``ssim_train_to_sample`` are ``{"mean": .., "best10": ..}``. A
    value is None if it has no meaning: SSIM of anything but images, distances of rows of anything else, ratios to a
    real distance of 0, diversity without two samples of one class. ``coverage`` grows with the number of samples: compare equal numbers.

    Args:
        samples: Generated samples ``[N, *S]`` in raw units.
        labels: Labels ``[N]``, integers in 0..C-1, that the samples were generated for.
        split: Data that the classifier was fitted to, and held-out real data.
        seed: Seed of the split of held-out samples into halves, and of the random choices if there are too many samples.
        oracle: Result of ``split_oracle(split, seed)``, to share it between several sets of samples; None fits it.

    Raises:
        UserError: Shapes or labels do not match the data, values are not finite, or there is too little held-out data.
    """
    return measure_all(compare(samples, labels, split, seed, oracle))


def compare(samples: Tensor, labels: Tensor, split: Split, seed: int = 0, oracle: Oracle | None = None) -> Comparison:
    """Return generated samples beside all that they are compared with; arguments and errors as those of ``judge``."""
    _check(samples, labels, split.train)
    test_half = halves(split.held_out, seed)[1]
    return _compare(samples, labels, split.train, oracle or split_oracle(split, seed), test_half, split.held_out, seed)


def nearness(samples: Tensor, split: Split) -> list[float | None]:
    """Return, for each training image, its distance to the nearest sample over its distance to the nearest held-out image.

    ``coverage`` is the share below 1. The ratio is None if the training image is also held out, because nothing can be nearer.

    Args:
        samples: Generated samples ``[N, *S]`` in raw units.
        split: Data as for ``judge``.
    """
    points, train, real = (flat_rows(t) for t in (samples.detach().cpu(), split.train.samples, split.held_out.samples))
    to_sample, to_real = nearest(train, points)[0], nearest(train, real)[0]
    return [ratio(float(own), float(other)) for own, other in zip(to_sample, to_real, strict=True)]


def split_oracle(split: Split, seed: int = 0) -> Oracle:
    """Return the independent classifier that ``oracle_accuracy`` uses, fitted to the first half of the held-out data."""
    return oracle_of(halves(split.held_out, seed)[0], seed)


def real_baseline(split: Split, seed: int = 0, oracle: Oracle | None = None) -> dict[str, Any]:
    """Return the metrics of real images: the second half of the held-out data, treated as if it had been generated.

    No image is compared with itself. ``oracle_accuracy`` is the accuracy of the oracle of ``judge`` (fitted to the first half) on
    the second half; ``transfer_accuracy`` swaps the halves; ``proximity``, ``coverage`` and ``diversity`` compare with the first
    half only. So coverage is about 0.5, its chance level with as many samples as held-out images; against all held-out
    images it would be 0 by construction.

    Raises:
        UserError: There is too little held-out data.
    """
    first, second = halves(split.held_out, seed)
    return _judge(second.samples, second.labels, split.train, oracle or oracle_of(first, seed), first, first, seed)


def noise_samples(
    count: int, shape: Sequence[int], value_range: tuple[float, float], classes: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return uniform noise ``[count, *shape]`` in ``value_range`` with labels ``[count]`` 0, 1, .., C-1, 0, 1, ..: the lower bound."""
    low, high = value_range
    noise = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * noise, torch.arange(count) % classes


def nearest_pairs(samples: Tensor, train: Tensor) -> Tensor:
    """Return the index ``[n]`` of the nearest of the samples ``[N, *S]`` for every training image of ``train`` ``[n, *S]``."""
    return nearest(flat_rows(train), flat_rows(samples))[1][:, 0]


def halves(data: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Return two disjoint random halves, stratified by class; the first has the additional sample of an odd number.

    Raises:
        UserError: Fewer than two classes have two samples, so that an SVC cannot be fitted to either half.
    """
    rng = np.random.default_rng([seed, 0])
    labels = data.labels.numpy()
    orders = [rng.permutation(np.flatnonzero(labels == c)) for c in range(len(data.classes))]
    if sum(len(order) > 1 for order in orders) < 2:
        raise UserError(
            f"the held-out part has {[len(order) for order in orders]} samples per class, too few for an evaluation",
            "give a larger data.held_out_size or a smaller data.train_size",
        )
    parts = (np.sort(np.concatenate([order[start::2] for order in orders])) for start in (0, 1))
    first, second = (data.subset(torch.from_numpy(part)) for part in parts)
    return first, second


def _judge(
    samples: Tensor, labels: Tensor, train: Dataset, oracle: Oracle, test_half: Dataset, real: Dataset, seed: int
) -> dict[str, Any]:
    """Return all metrics, with ``real`` as the data that distances are compared with."""
    return measure_all(_compare(samples, labels, train, oracle, test_half, real, seed))


def _compare(
    samples: Tensor, labels: Tensor, train: Dataset, oracle: Oracle, test_half: Dataset, real: Dataset, seed: int
) -> Comparison:
    generated = Dataset(samples.detach().cpu(), labels.detach().cpu(), train.classes, train.value_range)
    return Comparison(generated, train, oracle, test_half, real, seed)


def measure_all(comparison: Comparison) -> dict[str, Any]:
    """Return every registered metric by name."""
    return {metric.name: metric.function(comparison) for metric in METRICS}


def _check(samples: Tensor, labels: Tensor, train: Dataset) -> None:
    if samples.shape[1:] != train.samples.shape[1:] or labels.shape != samples.shape[:1] or len(samples) == 0:
        raise UserError(
            f"samples {list(samples.shape)} with labels {list(labels.shape)} do not match data of shape "
            f"{list(train.samples.shape[1:])}",
            "give at least one sample, and the data set that the classifier was fitted to",
        )
    if not bool(torch.isfinite(samples).all()):
        bad = int((~torch.isfinite(samples.flatten(1))).any(dim=1).sum())
        raise UserError(
            f"{bad} of {len(samples)} samples have values that are not finite",
            "evaluate a checkpoint from before the generator diverged",
        )
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= len(train.classes):
        raise UserError(
            f"the samples' labels ({labels.dtype}) go from {labels.min()} to {labels.max()}",
            f"give integers in 0..{len(train.classes) - 1}",
        )
