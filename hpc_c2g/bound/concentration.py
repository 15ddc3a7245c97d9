"""Deviation of the KKT sum over B samples from its expectation (pure functions).

G(B) = 1/B sum_i g_i, where a sample's summand g_i = B sum_j mu_ij grad m_ij is a vector of a Hilbert space (all tensors of theta, weighted
as the loss weights them). With m_c = E[g | c] and V_c = E[||g - m_c||^2 | c] the trace of the covariance within class c, n_c samples of
class c drawn independently, and G = 1/C sum_c m_c:

    E||G(B) - E G(B)||^2 = 1/B^2 sum_c n_c V_c,        E G(B) - G = sum_c (n_c / B - 1/C) m_c.

The first is the 1/B law: class means do not enter where every class has its fixed share. Labels drawn at random too have the trace of the
whole covariance, (within + between) / B with between = 1/C sum_c ||m_c - G||^2, and no second term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpc_c2g.kkt.margins import pairwise_margins
from hpc_c2g.kkt.stationarity import Classifier


def sample_gradients(
    phi: Classifier, theta: Mapping[str, Tensor], x: Tensor, labels: Tensor, multipliers: Tensor
) -> dict[str, Tensor]:
    """Per-sample sum_j mu_ij grad_k m_ij; their sum over samples is ``kkt_sum``.

    The backward of all b values is batched over b unit seeds: b times the work of one backward, so pass few samples at a time.

    Args:
        phi: the classifier with smooth gates.
        theta: parameters, any ``requires_grad``.
        x: normalized inputs ``[b, *S]``.
        labels: ``[b]``.
        multipliers: mu ``[b, C]``, zero at j = y_i.

    Returns:
        ``[b, *shape of theta_k]`` per parameter.
    """
    leaves = {k: t.detach().requires_grad_() for k, t in theta.items()}
    with torch.enable_grad():
        values = (multipliers * pairwise_margins(phi(leaves, x), labels)).sum(1)
        seeds = torch.eye(len(x), dtype=values.dtype, device=values.device)
        grads = torch.autograd.grad(values, list(leaves.values()), seeds, is_grads_batched=True, allow_unused=True)
    none = {k: t.new_zeros(len(x), *t.shape) for (k, t), g in zip(theta.items(), grads, strict=True) if g is None}
    return {k: none[k] if g is None else g for k, g in zip(theta, grads, strict=True)}


def cycled_counts(batch: int, classes: int) -> list[int]:
    """n_c, the number of samples i < B of class c when labels are i mod C."""
    return [(batch - c + classes - 1) // classes for c in range(classes)]


def mean_variance(variances: Sequence[float], counts: Sequence[int]) -> float:
    """E||G(B) - E G(B)||^2 = 1/B^2 sum_c n_c V_c for independent samples, B = sum_c n_c."""
    return math.fsum(v * n for v, n in zip(variances, counts, strict=True)) / sum(counts) ** 2


def imbalance(means: Tensor, counts: Sequence[int]) -> Tensor:
    """E G(B) - G = sum_c (n_c / B - 1/C) m_c ``[P]`` of class means ``[C, P]``: zero where the classes divide the batch."""
    shares = torch.tensor(counts, dtype=means.dtype, device=means.device) / sum(counts)
    return (shares - 1 / len(counts)) @ means


def between_variance(means: Tensor) -> float:
    """1/C sum_c ||m_c - G||^2 of class means ``[C, P]``."""
    return float((means - means.mean(0)).square().sum()) / len(means)


def bernstein_radius(variance: float, reach: float, batch: int, confidence: float) -> float:
    """Radius t with P(||G(B) - E G(B)|| >= t) <= 1 - confidence, for independent samples, independent of the dimension.

    Pinelis, "Optimum bounds for the distributions of martingales in Banach spaces", Ann. Probab. 22 (1994), theorem 3.4 (a Hilbert
    space is 2-smooth with D = 1): for independent d_i of mean zero with ||d_i|| <= M and V = sum_i E||d_i||^2,

        P(||sum_i d_i|| >= r) <= 2 exp(r/M - (r/M + V/M^2) log(1 + r M / V)) <= 2 exp(-r^2 / (2 (V + M r / 3))),

    the last step being Bernstein's simplification of Bennett's exponent. The d_i need not be alike, so fixed shares of the classes are
    covered. With L = log(2 / (1 - confidence)), r = B t and V = B^2 v:  t = M L / (3 B) + sqrt((M L / (3 B))^2 + 2 v L).

    Args:
        variance: v = E||G(B) - E G(B)||^2.
        reach: M, the largest ||g_i - E g_i||.
        batch: B.
        confidence: such as 0.95.
    """
    tail = math.log(2 / (1 - confidence))
    linear = reach * tail / (3 * batch)
    return linear + math.sqrt(linear**2 + 2 * variance * tail)


def exponent(batches: Sequence[int], errors: Sequence[float], standard_errors: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of log error against log B, and its standard error: -1/2 is the 1/B law of the squared error.

    Args:
        batches: Batch sizes B, at least two different ones.
        errors: Positive errors.
        standard_errors: Standard errors of the errors, independent.
    """
    x = [math.log(b) for b in batches]
    x = [value - math.fsum(x) / len(x) for value in x]
    norm = math.fsum(value**2 for value in x)
    slope = math.fsum(value * math.log(e) for value, e in zip(x, errors, strict=True)) / norm
    noise = math.fsum((value * s / e) ** 2 for value, e, s in zip(x, errors, standard_errors, strict=True))
    return slope, math.sqrt(noise) / norm
