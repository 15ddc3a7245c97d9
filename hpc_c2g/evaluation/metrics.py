"""How good generated samples are, judged with real data that the generator never saw.

Everything here *uses real data*: it is for one's own classifiers only, and generator training never sees a result of
it. All samples are in raw units (pixels in 0..1); distances are Euclidean over the flattened sample.

| key | meaning | for held-out real images | for the training images |
|---|---|---|---|
| ``proximity`` | median distance to the nearest training image, over the same for held-out images | 1 | 0 |
| ``coverage`` | share of training images with a sample nearer than their nearest held-out image | by chance | 1 |
| ``oracle_accuracy`` | share of samples whose label an oracle fitted to half of the held-out data agrees with | best | high |
| ``transfer_accuracy`` | accuracy of an SVC fitted to samples on the other held-out half | best | of n images |
| ``diversity`` | median distance of pairs within a class, over the same for held-out images | 1 | about 1 |
| ``ssim_sample_to_train`` | SSIM of each sample to its nearest training image | by chance | 1 |
| ``ssim_train_to_sample`` | SSIM of each training image to its nearest sample | by chance | 1 |
| ``marginal_distance`` | rows: Kolmogorov-Smirnov distance of a column to that of the training rows, mean over columns | by chance | 0 |
| ``correlation_distance`` | rows: difference of two columns' correlation from that in the training rows, mean over pairs | by chance | 0 |

The chance level of coverage, reached by N samples that are as good as real and know nothing of the training images, is
N / (N + number of held-out images).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_c2g.data.choose import even_shares
from hpc_c2g.data.dataset import Dataset, Split, flat_rows
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation.oracle import Oracle, oracle_of, svc_oracle
from hpc_c2g.evaluation.tables import correlation_distance, marginal_distance

TRANSFER_SAMPLES = 1000

PAIR_SAMPLES = 500
"""At most so many samples of a class form the pairs of ``diversity``: 124 750 pairs."""

SSIM_QUERIES = 1000
"""At most so many images are compared by SSIM; of more, a random choice."""

SSIM_CANDIDATES = 5
BEST = 10

BLOCK = 1024
"""Rows of a distance matrix that are held at once."""

SSIM_PIXELS = 2**17
"""Pixels that enter one call of SSIM: more fall out of the processor's cache, and take three times as long."""


def judge(samples: Tensor, labels: Tensor, split: Split, seed: int = 0, oracle: Oracle | None = None) -> dict[str, Any]:
    """All metrics of generated samples; see the table of this module.

    Every value is a float, ``ssim_sample_to_train`` and ``ssim_train_to_sample`` are ``{"mean": .., "best10": ..}``. A
    value is None where it has no meaning: SSIM of anything but images, distances of rows of anything else, ratios to a
    real distance of 0, diversity without two samples of one class. ``coverage`` grows with the number of samples: compare equal numbers.

    Args:
        samples: ``[N, *S]`` raw units.
        labels: ``[N]`` integers in 0..C-1: what the samples were generated as.
        split: the data the classifier was fitted to, and real data it never saw.
        seed: which held-out samples form which half, and which samples are drawn where there are too many.
        oracle: ``split_oracle(split, seed)``, from whom judges several sets; None fits it.

    Raises:
        UserError: shapes or labels that do not match the data, values that are not finite, too little held-out data.
    """
    _check(samples, labels, split.train)
    test_half = halves(split.held_out, seed)[1]
    return _judge(samples, labels, split.train, oracle or split_oracle(split, seed), test_half, split.held_out, seed)


def nearness(samples: Tensor, split: Split) -> list[float | None]:
    """Distance of each training image to its nearest sample over that to its nearest held-out image; ``coverage`` is the share below 1.

    None where the training image is held out too, so that nothing can be nearer.

    Args:
        samples: ``[N, *S]`` raw units.
        split: as for ``judge``.
    """
    points, train, real = (flat_rows(t) for t in (samples.detach().cpu(), split.train.samples, split.held_out.samples))
    to_sample, to_real = _nearest(train, points)[0], _nearest(train, real)[0]
    return [_ratio(float(own), float(other)) for own, other in zip(to_sample, to_real, strict=True)]


def split_oracle(split: Split, seed: int = 0) -> Oracle:
    """The independent classifier that ``oracle_accuracy`` asks, fitted to the first half of the held-out data."""
    return oracle_of(halves(split.held_out, seed)[0], seed)


def real_baseline(split: Split, seed: int = 0, oracle: Oracle | None = None) -> dict[str, Any]:
    """The metrics of real images: the second half of the held-out data, treated as if it had been generated.

    No image judges itself. ``oracle_accuracy`` is that of the very oracle of ``judge`` (fitted to the first half) on
    the second; ``transfer_accuracy`` swaps the halves; ``proximity``, ``coverage`` and ``diversity`` compare with the first
    half alone. So coverage is about 0.5, its chance level at as many samples as held-out images; against all held-out
    images it would be 0 by construction.

    Raises:
        UserError: too little held-out data.
    """
    first, second = halves(split.held_out, seed)
    return _judge(second.samples, second.labels, split.train, oracle or oracle_of(first, seed), first, first, seed)


def noise_samples(
    count: int, shape: Sequence[int], value_range: tuple[float, float], classes: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Uniform noise ``[count, *shape]`` in ``value_range``, and labels ``[count]`` 0, 1, .., C-1, 0, 1, ..: the floor."""
    low, high = value_range
    noise = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * noise, torch.arange(count) % classes


def nearest_pairs(samples: Tensor, train: Tensor) -> Tensor:
    """For every training image the index ``[n]`` of its nearest sample; samples ``[N, *S]``, train ``[n, *S]``."""
    return _nearest(flat_rows(train), flat_rows(samples))[1][:, 0]


def halves(data: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Two disjoint random halves, stratified by class; the first has the odd one.

    Raises:
        UserError: fewer than two classes have two samples, so that an SVC of either half has nothing to tell apart.
    """
    rng = np.random.default_rng([seed, 0])
    labels = data.labels.numpy()
    orders = [rng.permutation(np.flatnonzero(labels == c)) for c in range(len(data.classes))]
    if sum(len(order) > 1 for order in orders) < 2:
        raise UserError(
            f"the held-out part has {[len(order) for order in orders]} samples per class, too few to judge with",
            "give a larger data.held_out_size or a smaller data.train_size",
        )
    parts = (np.sort(np.concatenate([order[start::2] for order in orders])) for start in (0, 1))
    first, second = (data.subset(torch.from_numpy(part)) for part in parts)
    return first, second


def within_class_median(data: Dataset, seed: int) -> float | None:
    """Median distance over all pairs of one class, pooled over the classes; None where there is no pair.

    Of a class with more than ``PAIR_SAMPLES`` samples a random choice of so many is used.
    """
    pairs = []
    for c in range(len(data.classes)):
        points = flat_rows(data.samples[data.labels == c])
        if len(points) > PAIR_SAMPLES:
            points = points[np.random.default_rng([seed, 1, c]).permutation(len(points))[:PAIR_SAMPLES]]
        pairs.append(torch.pdist(points))
    pooled = torch.cat(pairs)
    return _median(pooled) if len(pooled) else None


def svc_accuracy(fit: Dataset, test: Dataset) -> float:
    """Accuracy on ``test`` of an SVC (Gaussian kernel of scikit-learn's default width, C = 10) fitted to ``fit``."""
    return _share(svc_oracle(fit), test)


def _judge(
    samples: Tensor, labels: Tensor, train: Dataset, oracle: Oracle, test_half: Dataset, real: Dataset, seed: int
) -> dict[str, Any]:
    """``real`` is what distances are compared with."""
    samples, labels = samples.detach().cpu(), labels.detach().cpu()
    generated = Dataset(samples, labels, train.classes, train.value_range)
    points, train_points, real_points = flat_rows(samples), flat_rows(train.samples), flat_rows(real.samples)
    to_train, near_sample = _nearest(points, train_points, SSIM_CANDIDATES)
    to_sample, near_train = _nearest(train_points, points, SSIM_CANDIDATES)
    to_real, _ = _nearest(train_points, real_points)
    real_to_train, _ = _nearest(real_points, train_points)
    return {
        "proximity": _ratio(_median(to_train), _median(real_to_train)),
        "coverage": float((to_sample < to_real).double().mean()),
        "oracle_accuracy": _share(oracle, generated),
        "transfer_accuracy": svc_accuracy(_first_per_class(generated, TRANSFER_SAMPLES), test_half),
        "diversity": _ratio(within_class_median(generated, seed), within_class_median(real, seed)),
        "ssim_sample_to_train": _ssim(samples, train.samples, near_sample, train.value_range, seed),
        "ssim_train_to_sample": _ssim(train.samples, samples, near_train, train.value_range, seed),
        "marginal_distance": marginal_distance(samples, train.samples),
        "correlation_distance": correlation_distance(samples, train.samples),
    }


def _share(oracle: Oracle, data: Dataset) -> float:
    """Of the data's labels, the oracle agrees with so many."""
    return float((oracle(data.samples) == data.labels).double().mean())


def _check(samples: Tensor, labels: Tensor, train: Dataset) -> None:
    if samples.shape[1:] != train.samples.shape[1:] or labels.shape != samples.shape[:1] or len(samples) == 0:
        raise UserError(
            f"samples {list(samples.shape)} with labels {list(labels.shape)} do not match data of shape "
            f"{list(train.samples.shape[1:])}",
            "judge at least one sample, with the data set that the classifier was fitted to",
        )
    if not bool(torch.isfinite(samples).all()):
        bad = int((~torch.isfinite(samples.flatten(1))).any(dim=1).sum())
        raise UserError(
            f"{bad} of {len(samples)} samples have values that are not finite",
            "judge a checkpoint from before the generator diverged",
        )
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= len(train.classes):
        raise UserError(
            f"the samples' labels ({labels.dtype}) go from {labels.min()} to {labels.max()}",
            f"give integers in 0..{len(train.classes) - 1}",
        )


def _nearest(queries: Tensor, references: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The distance ``[n]`` to the nearest reference, and the indices ``[n, count]`` of the nearest ones, nearest first.

    Args:
        queries: ``[n, d]`` float64.
        references: ``[m, d]`` float64.
        count: how many indices (m if there are fewer).
    """
    count = min(count, len(references))
    indices = torch.empty(len(queries), count, dtype=torch.int64)
    squares = references.square().sum(dim=1)
    for rows in _blocks(len(queries)):
        # Without the query's own square, which does not change the order.
        indices[rows] = (squares - 2 * queries[rows] @ references.T).topk(count, largest=False).indices
    # Anew from the difference: the expanded square would not be 0 for equal points.
    chunks = [(queries[rows] - references[indices[rows, 0]]).norm(dim=1) for rows in _blocks(len(queries))]
    return torch.cat(chunks), indices


def _ssim(
    queries: Tensor, references: Tensor, candidates: Tensor, value_range: tuple[float, float], seed: int
) -> dict[str, float] | None:
    """SSIM of every query to the most similar of its candidates: mean over all, and over the best ten; or None.

    The candidates are the 5 nearest in Euclidean distance, as the SSIM of all pairs would cost far more; over all
    pairs the mean came out higher by 0.0004 for digits, 0.001 for MNIST, 0.02 for CelebA.
    The Gaussian window has a deviation of 1.5 pixels (11x11), the usual one, for images of 24 pixels and more, and of
    1/16 of the shorter side for smaller ones: 0.5 (5x5) for 8x8 images, where the usual one would blur the whole image.

    Args:
        queries: ``[n, C, H, W]``; anything but images gives None.
        references: ``[m, C, H, W]``.
        candidates: ``[n, k]`` indices into references.
        value_range: smallest and largest raw value; what lies outside is clipped.
        seed: which queries are compared if there are more than ``SSIM_QUERIES``.
    """
    if queries.ndim != 4:
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes more than a second

    if len(queries) > SSIM_QUERIES:
        chosen = torch.from_numpy(np.random.default_rng([seed, 3]).permutation(len(queries))[:SSIM_QUERIES])
        queries, candidates = queries[chosen], candidates[chosen]
    low, high = value_range
    best = []
    for rows in _blocks(len(queries), max(1, SSIM_PIXELS // (candidates.shape[1] * queries[0].numel()))):
        choice = candidates[rows]
        similarity = structural_similarity_index_measure(
            queries[rows].float().repeat_interleave(choice.shape[1], dim=0) - low,
            references[choice.flatten()].float() - low,
            sigma=min(1.5, min(queries.shape[2:]) / 16),
            reduction="none",
            data_range=(0.0, high - low),
        )
        best.append(similarity.reshape(choice.shape).amax(dim=1))
    values = torch.cat(best).double()
    return {"mean": float(values.mean()), f"best{BEST}": float(values.topk(min(BEST, len(values))).values.mean())}


def _blocks(count: int, size: int = BLOCK) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _first_per_class(data: Dataset, most: int) -> Dataset:
    """The first samples of every class, equally many, ``most`` in all."""
    shares = even_shares(most, len(data.classes))
    return data.subset(torch.cat([(data.labels == c).nonzero()[:share, 0] for c, share in enumerate(shares)]))


def _median(values: Tensor) -> float:
    """The mean of the two middle values where their number is even (torch takes the lower one)."""
    return float(np.median(values.numpy()))


def _ratio(value: float | None, real: float | None) -> float | None:
    return value / real if value is not None and real else None
