"""What is known of any image before a classifier is asked: its box, its smoothness, that samples differ (sums over a micro-batch)."""

from __future__ import annotations

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


def root_mean_square_norm(x: Tensor) -> Tensor:
    """sqrt(mean_i |x_i|^2) over samples ``[B, *S]``."""
    return x.detach().flatten(1).square().sum(1).mean().sqrt()


def repulsion(
    x: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor, width: float, global_batch: int
) -> Tensor:
    """1/B sum_i mean over same-class references j of exp(-|x_i - x_j| / (width s)), s the references' root mean square norm.

    The references are detached, so that the term is a plain sum over samples and does not depend on the micro-batching.

    Args:
        x: ``[b, *S]`` with a graph.
        labels: ``[b]``.
        reference: ``[M, *S]``, the first M samples of the same global batch.
        reference_labels: ``[M]``.
        width: range of the repulsion in units of s.
        global_batch: B.
    """
    flat, others = x.flatten(1), reference.detach().flatten(1)
    reach = width * root_mean_square_norm(others).clamp_min(1e-12)
    total = flat.new_zeros(())
    for label in torch.unique(labels).tolist():
        same = others[reference_labels == label]
        if not len(same):  # fewer references than classes
            continue
        distances = torch.cdist(flat[labels == label], same, compute_mode="donot_use_mm_for_euclid_dist")
        # a sample's distance to itself drawn again is rounding, and its slope a unit vector at random
        distances = torch.where(distances < 1e-4 * reach, 0.0, distances)
        total = total + torch.exp(-distances / reach).mean(1).sum()
    return total / global_batch


def statistics_distance(moments: Sequence[Moments]) -> Tensor:
    """Mean over layers and channels of ((mean - running mean)^2 + (s - running s)^2) / (running s)^2, s = sqrt(variance + eps).

    What a BatchNorm keeps of its training data (Yin et al. 2020, DeepInversion). Of the whole batch already: no sum over samples.
    """
    layers = []
    for m in moments:
        spread, running = (m.variance + m.eps).sqrt(), (m.running_variance + m.eps).sqrt()
        layers.append((((m.mean - m.running_mean) / running).square() + (spread / running - 1).square()).mean())
    return torch.stack(layers).mean()


def standard_distance(moments: Tensor, mean_weight: float, deviation_weight: float) -> Tensor:
    """w_m sum_d (E x_d)^2 / sum_d E x_d^2 + w_s mean_d (sqrt(E x_d^2) - 1)^2: how far a batch is from standardised inputs.

    A classifier that subtracts its training mean has E x = 0 over what it was trained on, one that divides by the deviation E x_d^2 = 1:
    its normalization says so, no data are needed. The second fixes the scale of samples, which a large box leaves open.

    Args:
        moments: E x and E x^2 over the whole batch, ``[2, *S]``.
        mean_weight: w_m.
        deviation_weight: w_s.
    """
    mean, second = moments
    deviation = second.clamp_min(1e-12).sqrt()
    shift: Tensor = mean.square().sum() / second.sum().clamp_min(1e-12)
    spread: Tensor = (deviation - 1).square().mean()
    return mean_weight * shift + deviation_weight * spread


def share_of(distance: Callable[[Tensor], Tensor], total: Tensor, part: Tensor, share: float) -> Tensor:
    """A function of a sum over the whole batch as one micro-batch's term: its share of the value, with the exact slope of its own part.

    Args:
        distance: of the sum.
        total: over all micro-batches and ranks, without a graph.
        part: this micro-batch's own part of the sum, with its graph.
        share: of the value that it counts.
    """
    leaf = total.detach().requires_grad_()
    with torch.enable_grad():
        value = distance(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
    straight = (slope * part).sum()
    return value.detach() * share + straight - straight.detach()
