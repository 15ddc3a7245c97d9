"""Primal feasibility and complementary slackness: a U in the scaled margin e^a m (sums over a micro-batch).

Every function returns a *sum* over its samples divided by the global batch size, so that micro-batches and ranks add up.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from hpc_c2g.kkt.margins import other_classes, smallest_margins


def multipliers_from(h: Tensor, labels: Tensor, scale: float, global_batch: int) -> Tensor:
    """mu_ij = S / B softplus(h_ij), zero at j = y_i.

    Args:
        h: output of the multiplier network, ``[B, C]``.
        labels: ``[B]``.
        scale: S = <Lambda theta(a), c theta(a)>.
        global_batch: B.
    """
    return scale / global_batch * F.softplus(h) * other_classes(labels, h.shape[1])


def neutral_logit(classes: int) -> float:
    """The h at which sum_j softplus(h_ij) = 1 over the C - 1 other classes: multipliers then start at the scale S."""
    return math.log(math.expm1(1 / (classes - 1)))


def feasibility(margins: Tensor, labels: Tensor, alpha: float, global_batch: int) -> Tensor:
    """1/B sum_i relu(1 - min_j e^a m_ij)^2: scaled margins below 1 are not feasible."""
    return (1 - math.exp(alpha) * smallest_margins(margins, labels)).relu().square().sum() / global_batch


def slackness(margins: Tensor, multipliers: Tensor, alpha: float, scale: float) -> Tensor:
    """1/S sum_ij mu_ij relu(e^a m_ij - 1): a multiplier above the margin band breaks complementary slackness."""
    return (multipliers * (math.exp(alpha) * margins - 1).relu()).sum() / scale


def weighted_margin_sums(margins: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
    """(sum mu m, sum mu): their ratio times e^a is rho, 1 at a KKT point."""
    return (multipliers * margins).sum(), multipliers.sum()
