"""Priors on samples: the input box, smoothness, moments (sums over a micro-batch)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpc_c2g.kkt.normalization import Moments


def box_excess(x: Tensor, lower: Tensor, upper: Tensor, global_batch: int) -> Tensor:
    """1/B sum over samples and entries of (relu(x - upper)^2 + relu(lower - x)^2) / half_range^2; x ``[B, *S]``."""
    half = (upper - lower) / 2
    # the nearest point of the box is a constant to the derivative, in few passes over x (mse_loss would hold as much again)
    return (x - x.detach().clamp(lower, upper)).div_(half).square().sum() / global_batch


def total_variation(x: Tensor, global_batch: int) -> Tensor:
    """1/B sum over samples of the mean absolute difference of neighboring pixels; x ``[B, channels, H, W]``."""
    rows, columns = (x[..., 1:, :] - x[..., :-1, :]).abs(), (x[..., 1:] - x[..., :-1]).abs()
    # an image one pixel wide has no columns to compare
    return (
        rows.sum() / max(1, rows.shape[1:].numel()) + columns.sum() / max(1, columns.shape[1:].numel())
    ) / global_batch


def statistics_distance(moments: Sequence[Moments]) -> Tensor:
    """Mean over layers and channels of ((mean - running mean)^2 + (s - running s)^2) / (running s)^2, s = sqrt(variance + eps).

    Distance of a batch from the statistics that a BatchNorm keeps of its training data (Yin et al. 2020, DeepInversion). The moments are
    those of the whole batch already, so that nothing is summed over samples.
    """
    layers = []
    for m in moments:
        spread, running = (m.variance + m.eps).sqrt(), (m.running_variance + m.eps).sqrt()
        layers.append((((m.mean - m.running_mean) / running).square() + (spread / running - 1).square()).mean())
    return torch.stack(layers).mean()


def standard_distance(moments: Tensor, mean_weight: float, deviation_weight: float) -> Tensor:
    """w_m sum_d (E x_d)^2 / sum_d E x_d^2 + w_s mean_d (sqrt(E x_d^2) - 1)^2: the distance of a batch from standardized inputs.

    A classifier that subtracts its training mean has E x = 0 over its training data, one that divides by the deviation E x_d^2 = 1:
    this follows from its normalization, without data. The second condition fixes the scale of samples, which a large box leaves open.

    Args:
        moments: Moments E x and E x^2 over the whole batch, ``[2, *S]``.
        mean_weight: Weight w_m of the mean.
        deviation_weight: Weight w_s of the deviation.
    """
    mean, second = moments
    deviation = second.clamp_min(1e-12).sqrt()
    shift: Tensor = mean.square().sum() / second.sum().clamp_min(1e-12)
    spread: Tensor = (deviation - 1).square().mean()
    return mean_weight * shift + deviation_weight * spread


def standard_share(
    x: Tensor, moments: Tensor | None, mean_weight: float, deviation_weight: float, global_batch: int
) -> Tensor:
    """A micro-batch's share of ``standard_distance``, with the exact slope of its own samples.

    Args:
        x: Samples ``[b, *S]``.
        moments: Moments E x and E x^2 over the whole batch, ``[2, *S]``.
        mean_weight: Weight w_m of the mean.
        deviation_weight: Weight w_s of the deviation.
        global_batch: Number of samples B of the whole batch.

    Raises:
        ValueError: ``moments`` is None.
    """
    if moments is None:
        raise ValueError("the distance from standardized inputs needs the moments of the whole batch")
    own = torch.stack([x.sum(0), x.square().sum(0)]) / global_batch
    distance = functools.partial(standard_distance, mean_weight=mean_weight, deviation_weight=deviation_weight)
    return share_of(distance, moments, own, len(x) / global_batch)


def share_of(distance: Callable[[Tensor], Tensor], total: Tensor, part: Tensor, share: float) -> Tensor:
    """A micro-batch's term of a function of a sum over the whole batch: its share of the value, with the exact slope of its own part.

    Args:
        distance: Function of the sum.
        total: Sum over all micro-batches and ranks, without a graph.
        part: Part of this micro-batch in the sum, with its graph.
        share: Share of the value that the micro-batch counts.
    """
    leaf = total.detach().requires_grad_()
    with torch.enable_grad():
        value = distance(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
    straight = (slope * part).sum()
    return value.detach() * share + straight - straight.detach()
