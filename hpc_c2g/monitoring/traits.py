"""What a batch of generated samples tells of itself, without data: spread, roughness, saturation, and who carries the multipliers."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BAND = (0.5, 2.0)
"""Scaled margins within a factor 2 of 1, where a KKT point has those of all samples that carry multipliers."""
CARRIES = 0.05
"""Of the mean multiplier: a sample with less carries nothing."""
EDGE = 0.01
"""Of the box: values that near to its lower or upper end are saturated."""


def diversity(x: Tensor, labels: Tensor) -> Tensor:
    """sqrt(tr W / tr T): spread within the classes over the whole spread; 0: one image per class, 1: the label does not matter.

    W = sum_c sum_{i in c} |x_i - m_c|^2 / sum_c (n_c - 1), T = sum_i |x_i - m|^2 / (n - 1): unbiased, so that it does not depend on
    the batch. Where nothing differs it is 0.

    Args:
        x: ``[n, *S]``.
        labels: ``[n]``.
    """
    flat = x.flatten(1).double()
    within, freedom = flat.new_zeros(()), 0
    for label in torch.unique(labels).tolist():
        own = flat[labels == label]
        within, freedom = within + (own - own.mean(0)).square().sum(), freedom + len(own) - 1
    total = (flat - flat.mean(0)).square().sum() / max(1, len(flat) - 1)
    if not freedom or not total > 0:
        return flat.new_zeros(())
    return (within / freedom / total).clamp(max=1).sqrt()


def roughness(x: Tensor) -> Tensor:
    """Share of energy at high frequencies against white noise: sum of squared differences of neighbours over 2 x their variance.

    von Neumann's ratio (Ann. Math. Statist. 12, 1941) in the plane: 1 - the correlation of neighbouring pixels, 0 for smooth images, 1
    for noise, 2 for a checkerboard; 0 where images are flat.

    Args:
        x: ``[n, channels, H, W]``.
    """
    x = x.double()
    deviation = x - x.mean((-2, -1), keepdim=True)
    differences, energies = [], []
    for a, b in ((deviation[..., 1:, :], deviation[..., :-1, :]), (deviation[..., 1:], deviation[..., :-1])):
        differences.append((a - b).square().sum())
        energies.append(a.square().sum() + b.square().sum())
    energy = torch.stack(energies).sum()
    return torch.stack(differences).sum() / energy if energy > 0 else energy


def saturation(x: Tensor) -> Tensor:
    """Share of the values at an end of the box or beyond; ``x`` in 0..1 within the box."""
    return ((x < EDGE) | (x > 1 - EDGE)).double().mean()


def unsupported(margins: Tensor, multipliers: Tensor) -> Tensor:
    """Share of samples that satisfy nothing: off the margin band, or without multipliers.

    Args:
        margins: scaled, e^a min_j m_ij, ``[B]``.
        multipliers: of each sample, sum_j mu_ij in units of their mean at a KKT point, ``[B]``.
    """
    off = (margins < BAND[0]) | (margins > BAND[1])
    return (off | (multipliers < CARRIES * multipliers.mean())).double().mean()


def class_mass(multipliers: Tensor, labels: Tensor, classes: int) -> Tensor:
    """C x each class's part of sum mu / S, ``[C]``: all 1 where a KKT point shares its multipliers evenly, 0 where a class gets none."""
    mass = torch.zeros(classes, dtype=torch.float64, device=multipliers.device)
    return mass.index_add(0, labels, multipliers.double()) * classes / len(multipliers)


def quantiles(name: str, values: Tensor) -> dict[str, float]:
    """``name/q05`` to ``name/q95``, of an even sample where there are many values."""
    sample = values.flatten().float()
    sample = sample[:: max(1, len(sample) // 100_000)]
    points = torch.quantile(sample, torch.tensor(QUANTILES, device=sample.device)).tolist()
    return {f"{name}/q{round(100 * q):02d}": value for q, value in zip(QUANTILES, points, strict=True)}


def traits(margins: Tensor, multipliers: Tensor, labels: Tensor, samples: Tensor, classes: int) -> dict[str, float]:
    """All that is logged of one classifier's samples.

    Args:
        margins: scaled, e^a min_j m_ij, ``[B]``.
        multipliers: mu_ij B / S, j != y_i, ``[B, C - 1]``.
        labels: ``[B]``.
        samples: the first of them, in 0..1 within the box, ``[n, *S]``.
        classes: C.
    """
    each, n = multipliers.sum(1), len(samples)
    found = {
        "diversity": diversity(samples, labels[:n]),
        "unsupported": unsupported(margins, each),
        "class_mass": class_mass(each, labels, classes).amin(),
        "multipliers/share_of_zeros": (multipliers < 1e-3 * multipliers.mean()).double().mean(),
    }
    if samples.dim() == 4:
        found |= {"roughness": roughness(samples), "saturation": saturation(samples)}
    numbers = torch.stack([value.double() for value in found.values()]).tolist()  # to the host in one piece
    told = dict(zip(found, numbers, strict=True))
    return {**told, **quantiles("margins", margins), **quantiles("multipliers", multipliers)}
