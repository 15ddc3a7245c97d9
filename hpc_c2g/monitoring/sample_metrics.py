"""Statistics of a batch of generated samples, computed without data: spread, roughness, saturation, distribution of the multipliers.

``SAMPLE_METRICS`` registers each with its curve. They run on the host in numpy, whose small operators take a third of torch's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_c2g.monitoring.curves import Curve

Array = NDArray[Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BAND = (0.5, 2.0)
"""Range of scaled margins within a factor 2 of 1, which every sample with multipliers has at a KKT point."""
CARRIES = 0.05
"""Share of the mean multiplier below which a sample counts as one without multipliers."""
EDGE = 0.01
"""Share of the box at its lower and upper end within which values count as saturated."""
SAMPLED = 10_007
"""Largest number of values that quantiles are computed from: a prime."""


def diversity(x: Array, labels: Array) -> float:
    """Return sqrt(tr W / tr T), the spread within classes over the total spread; 0: one image per class, 1: the label does not matter.

    W = sum_c sum_{i in c} |x_i - m_c|^2 / sum_c (n_c - 1), T = sum_i |x_i - m|^2 / (n - 1): unbiased, so that it does not depend on
    the batch. It is 0 if nothing differs.

    Args:
        x: Samples ``[n, *S]``.
        labels: Labels ``[n]``.
    """
    flat, n = x.reshape(len(x), -1), len(x)
    flat = flat - flat.mean(0)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    counts = np.diff(starts, append=n)
    sorted_ = flat[order]
    apart = sorted_ - np.repeat(np.add.reduceat(sorted_, starts) / counts[:, None], counts, axis=0)
    total, within = float(np.vdot(flat, flat)), float(np.vdot(apart, apart))
    if n - len(starts) < 1 or not total > 0:
        return 0.0
    return min(1.0, math.sqrt(within / (n - len(starts)) / (total / (n - 1))))


def roughness(x: Array) -> float:
    """Return the share of energy at high frequencies against white noise: sum of squared neighbor differences over 2 x their variance.

    von Neumann's ratio (Ann. Math. Statist. 12, 1941) in the plane: 1 - the correlation of neighboring pixels, 0 for smooth images, 1
    for noise, 2 for a checkerboard; 0 where images are flat.

    Args:
        x: Images ``[n, channels, H, W]``.
    """
    x = x - x.mean((-2, -1), keepdims=True)
    down, across = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
    # every pixel counts in each pair that it belongs to
    edges = sum(float((edge * edge).sum()) for edge in (x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]))
    energy = 4 * float(np.vdot(x, x)) - edges
    return float(np.vdot(down, down) + np.vdot(across, across)) / energy if energy > 0 else 0.0


def saturation(x: Array) -> float:
    """Return the share of values at an end of the box or beyond; ``x`` is in 0..1 within the box."""
    return float((np.abs(x - 0.5) > 0.5 - EDGE).mean())


def unsupported(margins: Array, multipliers: Array) -> float:
    """Return the share of samples off the margin band or without multipliers, which satisfy no condition.

    Args:
        margins: Scaled margins e^a min_j m_ij, ``[B]``.
        multipliers: Sum of each sample's multipliers, sum_j mu_ij, in units of their mean at a KKT point, ``[B]``.
    """
    off = (margins < BAND[0]) | (margins > BAND[1])
    return float((off | (multipliers < CARRIES * multipliers.mean())).mean())


def class_mass(multipliers: Array, labels: Array, classes: int) -> Array:
    """Return C x each class's part of sum mu / S, ``[C]``: all 1 if the classes share the multipliers evenly, 0 for a class with none."""
    return np.bincount(labels, multipliers, classes) * classes / len(multipliers)


def quantiles(name: str, values: Array) -> dict[str, float]:
    """Return ``name/q05`` to ``name/q95``; of many values, from an evenly spaced sample."""
    sample = values.reshape(-1)
    if (
        n := len(sample)
    ) > SAMPLED:  # the step shares no factor with the number of classes, because samples cycle through them
        sample = sample[np.arange(SAMPLED) * n // SAMPLED]
    ordered = np.sort(sample)
    points = np.interp(np.array(QUANTILES) * (len(ordered) - 1), np.arange(len(ordered)), ordered)
    return {f"{name}/q{round(100 * q):02d}": float(value) for q, value in zip(QUANTILES, points, strict=True)}


@dataclass(frozen=True)
class Batch:
    """Generated samples of one classifier, on the host.

    Attributes:
        margins: Scaled margins e^a min_j m_ij, ``[B]``.
        multipliers: mu_ij B / S for j != y_i, ``[B, C - 1]``.
        labels: Labels ``[B]``.
        samples: First samples of the batch ``[n, *S]``, in 0..1 within the box.
        classes: Number of classes C.
    """

    margins: Array
    multipliers: Array
    labels: Array
    samples: Array
    classes: int

    @property
    def is_images(self) -> bool:
        """True if the samples are images ``[n, channels, H, W]``."""
        return self.samples.ndim == 4


@dataclass(frozen=True)
class SampleMetric:
    """A statistic of a batch, and the curve that it becomes.

    Attributes:
        function: The statistic: a float, or the values whose quantiles are logged if ``curve.quantiles``.
        curve: Its curve, under whose name it is logged.
        images: True if it applies to images only.
    """

    function: Callable[[Batch], Any]
    curve: Curve
    images: bool = False


MULTIPLIERS, SAMPLES = "Margins and multipliers", "Samples"

SAMPLE_METRICS = (
    SampleMetric(
        lambda b: diversity(b.samples, b.labels[: len(b.samples)]),
        Curve("diversity", SAMPLES, "diversity", averaged=True),
    ),
    SampleMetric(
        lambda b: unsupported(b.margins, b.multipliers.sum(1)),
        Curve("unsupported", SAMPLES, "share off the margin band or without multipliers", averaged=True),
    ),
    SampleMetric(
        lambda b: float(class_mass(b.multipliers.sum(1), b.labels, b.classes).min()),
        Curve("class_mass", MULTIPLIERS, "smallest class's share of the multipliers", averaged=True),
    ),
    SampleMetric(
        lambda b: float((b.multipliers < 1e-3 * b.multipliers.mean()).mean()),
        Curve("multipliers/share_of_zeros", MULTIPLIERS, "share of multipliers near zero"),
    ),
    SampleMetric(
        lambda b: roughness(b.samples),
        Curve("roughness", SAMPLES, "roughness and saturation", averaged=True),
        images=True,
    ),
    SampleMetric(
        lambda b: saturation(b.samples), Curve("saturation", SAMPLES, "roughness and saturation"), images=True
    ),
    SampleMetric(lambda b: b.margins, Curve("margins", MULTIPLIERS, "scaled margins", quantiles=True, averaged=True)),
    SampleMetric(
        lambda b: b.multipliers,
        Curve("multipliers", MULTIPLIERS, "relative multipliers", quantiles=True, averaged=True),
    ),
)
"""Every statistic of samples, in the order of metrics.jsonl."""


def sample_metrics(margins: Array, multipliers: Array, labels: Array, samples: Array, classes: int) -> dict[str, float]:
    """All statistics of one classifier's samples by name; see ``Batch`` for the arguments."""
    batch = Batch(margins, multipliers, labels, samples, classes)
    found: dict[str, float] = {}
    for metric in SAMPLE_METRICS:
        if metric.images and not batch.is_images:
            continue
        value, name = metric.function(batch), metric.curve.name
        found |= quantiles(name, value) if metric.curve.quantiles else {name: value}
    return found
