"""Expectation and covariance of a generator's summands: the reference of a batch's KKT sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_c2g.bound import concentration
from hpc_c2g.bound.config import INDEPENDENT
from hpc_c2g.bound.summands import Summands, drawing
from hpc_c2g.generators.config import LATENT_DIMENSIONS
from hpc_c2g.generators.latents import fresh_latents

REFERENCE = 2**60
"""First draw number of the expectation's samples."""
LATTICES = 16
"""Number of lattices: the expectation is their mean, and their spread estimates its error."""


@dataclass(frozen=True)
class Moments:
    """Measured moments of the summands g.

    Attributes:
        means: m_c = E[g | c], ``[C, P]``.
        center_variance: Expected squared error of ``center``.
        variances: V_c = E[||g - m_c||^2 | c].
        reach: Largest observed ||g - m_c||.
        reach_overall: Largest observed ||g - G||.
    """

    means: Tensor
    center_variance: float
    variances: list[float]
    reach: float
    reach_overall: float

    @property
    def center(self) -> Tensor:
        """G ``[P]``."""
        return self.means.mean(0)

    @property
    def within(self) -> float:
        """Trace of the covariance within the classes."""
        return math.fsum(self.variances) / len(self.variances)

    @property
    def overall(self) -> float:
        """Trace of the whole covariance."""
        return self.within + concentration.between_variance(self.means)

    def law(self, scheme: str, batch: int) -> tuple[float, float, Tensor]:
        """E||G(B) - E G(B)||^2 of independent samples with the labels of ``scheme``, their largest ||g - E g||, and E G(B) - G ``[P]``."""
        if scheme == INDEPENDENT:
            return self.overall / batch, self.reach_overall, torch.zeros_like(self.means[0])
        counts = concentration.cycled_counts(batch, len(self.variances))
        variance = concentration.mean_variance(self.variances, counts)
        return variance, self.reach, concentration.imbalance(self.means, counts)


def measure(summands: Summands, count: int, seed: int) -> Moments:
    """Estimate the expectation from ``count`` samples in lattices, and the covariance from as many independent ones.

    Args:
        summands: Summands of one member.
        count: Number of samples, at least two per class.
        seed: Seed of the draws.
    """
    means, center_variance = expectation(summands, count, seed)
    center, variances, reach, reach_overall = means.mean(0), [], 0.0, 0.0
    classes = summands.classes
    latents = fresh_latents(seed, count, LATENT_DIMENSIONS, classes, member=summands.classifier)
    for c, mean in enumerate(means):
        own = latents[c::classes]
        number, squares, drift = len(own.labels), 0.0, torch.zeros_like(mean)
        for g in summands.each(own):
            deviations = g - mean
            distances = deviations.norm(dim=1)
            squares, drift = squares + float(distances.square().sum()), drift + deviations.sum(0)
            reach = max(reach, float(distances.max()))
            reach_overall = max(reach_overall, float((g - center).norm(dim=1).max()))
        variances.append((squares - float(drift.square().sum()) / number) / (number - 1))  # exact for any ``mean``
    return Moments(means, center_variance, variances, reach, reach_overall)


def expectation(summands: Summands, count: int, seed: int) -> tuple[Tensor, float]:
    """Estimate m_c ``[C, P]``, and the expected squared error of their mean G.

    Randomized quasi-Monte Carlo: the mean of ``LATTICES`` shifted lattices, each without bias because every class fills its own, and
    1/LATTICES of the variance among them (Owen, "Monte Carlo theory, methods and examples", chapter 17). As many independent samples
    estimate G less accurately, too inaccurately to judge a large lattice. If ``count`` allows, a lattice meets all codes equally often.
    """
    classes, each = summands.classes, count // LATTICES
    size = each // summands.period * summands.period or max(1, each // classes) * classes
    draw = drawing("stratified", classes, size, seed, summands.classifier)
    means, squares = torch.zeros(classes, len(summands.left)).to(summands.left), 0.0
    for i in range(LATTICES):
        latents = draw(REFERENCE + i)
        step = torch.stack([summands.mean(latents[c::classes]) for c in range(classes)]) - means
        squares += float(step.mean(0).square().sum()) * i / (i + 1)  # Welford 1962: mean and squares in one pass
        means += step / (i + 1)
    return means, squares / (LATTICES - 1) / LATTICES
