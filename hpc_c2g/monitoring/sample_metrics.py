"""What a batch of generated samples tells of itself, without data: spread, roughness, saturation, and who carries the multipliers.

On the host in numpy: of a few numbers its small operators take a third of torch's time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BAND = (0.5, 2.0)
"""Scaled margins within a factor 2 of 1, where a KKT point has those of all samples that carry multipliers."""
CARRIES = 0.05
"""Of the mean multiplier: a sample with less carries nothing."""
EDGE = 0.01
"""Of the box: values that near to its lower or upper end are saturated."""
SAMPLED = 10_007
"""Values that quantiles are taken of at most: a prime."""


def diversity(x: Array, labels: Array) -> float:
    """sqrt(tr W / tr T): spread within the classes over the whole spread; 0: one image per class, 1: the label does not matter.

    W = sum_c sum_{i in c} |x_i - m_c|^2 / sum_c (n_c - 1), T = sum_i |x_i - m|^2 / (n - 1): unbiased, so that it does not depend on
    the batch. Where nothing differs it is 0.

    Args:
        x: ``[n, *S]``.
        labels: ``[n]``.
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
    """Share of energy at high frequencies against white noise: sum of squared differences of neighbors over 2 x their variance.

    von Neumann's ratio (Ann. Math. Statist. 12, 1941) in the plane: 1 - the correlation of neighboring pixels, 0 for smooth images, 1
    for noise, 2 for a checkerboard; 0 where images are flat.

    Args:
        x: ``[n, channels, H, W]``.
    """
    x = x - x.mean((-2, -1), keepdims=True)
    down, across = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
    # every pixel counts in each pair that it belongs to
    edges = sum(float((edge * edge).sum()) for edge in (x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]))
    energy = 4 * float(np.vdot(x, x)) - edges
    return float(np.vdot(down, down) + np.vdot(across, across)) / energy if energy > 0 else 0.0


def saturation(x: Array) -> float:
    """Share of the values at an end of the box or beyond; ``x`` in 0..1 within the box."""
    return float((np.abs(x - 0.5) > 0.5 - EDGE).mean())


def unsupported(margins: Array, multipliers: Array) -> float:
    """Share of samples that satisfy nothing: off the margin band, or without multipliers.

    Args:
        margins: scaled, e^a min_j m_ij, ``[B]``.
        multipliers: of each sample, sum_j mu_ij in units of their mean at a KKT point, ``[B]``.
    """
    off = (margins < BAND[0]) | (margins > BAND[1])
    return float((off | (multipliers < CARRIES * multipliers.mean())).mean())


def class_mass(multipliers: Array, labels: Array, classes: int) -> Array:
    """C x each class's part of sum mu / S, ``[C]``: all 1 where a KKT point shares its multipliers evenly, 0 where a class gets none."""
    return np.bincount(labels, multipliers, classes) * classes / len(multipliers)


def quantiles(name: str, values: Array) -> dict[str, float]:
    """``name/q05`` to ``name/q95``, of an even sample where there are many values."""
    sample = values.reshape(-1)
    if (
        n := len(sample)
    ) > SAMPLED:  # a step that shares no factor with the number of classes, by whose turns samples come
        sample = sample[np.arange(SAMPLED) * n // SAMPLED]
    ordered = np.sort(sample)
    points = np.interp(np.array(QUANTILES) * (len(ordered) - 1), np.arange(len(ordered)), ordered)
    return {f"{name}/q{round(100 * q):02d}": float(value) for q, value in zip(QUANTILES, points, strict=True)}


def sample_metrics(margins: Array, multipliers: Array, labels: Array, samples: Array, classes: int) -> dict[str, float]:
    """All that is logged of one classifier's samples.

    Args:
        margins: scaled, e^a min_j m_ij, ``[B]``.
        multipliers: mu_ij B / S, j != y_i, ``[B, C - 1]``.
        labels: ``[B]``.
        samples: the first of them, in 0..1 within the box, ``[n, *S]``.
        classes: C.
    """
    each, n = multipliers.sum(1), len(samples)
    told = {
        "diversity": diversity(samples, labels[:n]),
        "unsupported": unsupported(margins, each),
        "class_mass": float(class_mass(each, labels, classes).min()),
        "multipliers/share_of_zeros": float((multipliers < 1e-3 * multipliers.mean()).mean()),
    }
    if samples.ndim == 4:
        told |= {"roughness": roughness(samples), "saturation": saturation(samples)}
    return {**told, **quantiles("margins", margins), **quantiles("multipliers", multipliers)}
