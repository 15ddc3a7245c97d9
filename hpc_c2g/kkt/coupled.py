"""The KKT sum of samples that batch statistics couple, micro-batch by micro-batch.

Let s_l be the statistics of the l-th BatchNorm and c_l what a micro-batch p adds to them, so that s_l = sum_p c_l(x_p, theta, s_<l). With
F = sum mu m as a function of theta and of all s as if they were free, and the Lagrangian

    L = F + sum_l <lambda_l, c_l - s_l>,       lambda_l = d/ds_l (F + sum_{m > l} <lambda_m, c_m>),        G = dL/dtheta.

Each is a plain sum over micro-batches once the previous ones are known: s_l from the first layer up, the adjoints lambda_l from the last
layer down. The cotangents of <v, G> + losses follow in the same way, the tangents q_l of s_l along v upwards and the adjoints p_l of R
downwards:

    q_l = <v, dc_l/dtheta> + sum_{m < l} <q_m, dc_l/ds_m>,
    R   = <v, dL/dtheta> + sum_l <q_l, dL/ds_l> + losses + sum_l <p_l, c_l>,      p_l = dR/ds_l,      cotangents = dR/d(x, mu).

For K layers that is 4 K + 2 passes over the samples instead of two, with the memory of one micro-batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpc_c2g.kkt.margins import pairwise_margins
from hpc_c2g.kkt.normalization import Moments, Reduction, flatten_positions
from hpc_c2g.kkt.stationarity import OnReady

MicroBatch = tuple[Tensor, Tensor, Tensor]
"""x ``[b, *S]``, labels ``[b]`` and mu ``[b, C]`` of a micro-batch."""
Losses = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(margins, mu, x, labels) of a micro-batch -> a scalar that is a plain sum over samples."""


class _LayerReached(Exception):  # noqa: N818 - control flow, not an error
    """Raised in the forward pass when the requested layer has been called: later layers are not needed."""


@dataclass
class PartialStats:
    """Statistics of the whole batch for the forward pass of one micro-batch.

    Attributes:
        values: s_l ``[2, channels]`` of the first layers: the mean, and the second moment about the constant ``centers``.
        centers: Value of the mean, so that the second moment is the variance, without cancellation.
        counts: N_l, number of positions of the whole batch.
        until: Index of the layer at which to stop; ``values`` must hold all earlier layers.
        parts: c_l ``[2, channels]``, the micro-batch's contribution to s_l.
        moments: Statistics per layer, as in ``BatchStatistics``.
        stopped_input: Input ``[positions, channels]`` of the first layer without ``values``.
    """

    values: list[Tensor]
    centers: list[Tensor]
    counts: list[Tensor]
    until: int = -1
    parts: list[Tensor] = field(default_factory=list)
    moments: list[Moments] = field(default_factory=list)
    stopped_input: Tensor | None = None

    def __call__(self, x: Tensor, running_mean: Tensor, running_variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and variance of the layer that is called, ``[channels]``."""
        layer, positions = len(self.parts), flatten_positions(x)
        if layer == len(self.values):
            self.stopped_input = positions
            raise _LayerReached
        centered = positions - self.centers[layer]
        self.parts.append(torch.stack([positions.sum(0), centered.square().sum(0)]) / self.counts[layer])
        if layer == self.until:
            raise _LayerReached
        mean, second = self.values[layer]
        variance = second - (mean - self.centers[layer]).square()
        self.moments.append(Moments(mean, variance, running_mean, running_variance, eps))
        return mean, variance


class CoupledSum:
    """KKT sum of one batch of one classifier with batch statistics.

    Args:
        phi: (theta, x, statistics) -> logits.
        theta: Parameters of the classifier.
        micro_batches: Returns an iterator over this rank's micro-batches, detached and the same each time; called once per pass.
        reduce: Sum over ranks.

    Attributes:
        moments: Statistics per layer of the last evaluated micro-batch.
    """

    def __init__(
        self,
        phi: Callable[[Mapping[str, Tensor], Tensor, PartialStats], Tensor],
        theta: Mapping[str, Tensor],
        micro_batches: Callable[[], Iterator[MicroBatch]],
        reduce: Reduction,
    ) -> None:
        self.phi, self.micro_batches, self.reduce = phi, micro_batches, reduce
        self.theta = {k: t.detach() for k, t in theta.items()}
        self.values: list[Tensor] = []
        self.centers: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.moments: list[Moments] = []
        self.losses: Losses | None = None
        while self._measure():
            pass
        self.adjoints = [torch.zeros_like(s) for s in self.values]
        for layer in reversed(range(len(self.values))):
            self.adjoints[layer] = self._total(functools.partial(self._adjoint, layer=layer))

    def kkt_sum(
        self, x: Tensor, labels: Tensor, multipliers: Tensor, keep_graph: bool = False, on_ready: OnReady | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Margins and G of one micro-batch, without a graph; ``on_ready`` is not called.

        Raises:
            ValueError: ``keep_graph``: the graph of one micro-batch is not that of G.
        """
        if keep_graph:
            raise ValueError("the KKT sum of coupled micro-batches keeps no graph")
        leaves = self._leaves()
        with torch.enable_grad():
            margins, lagrangian, _ = self._lagrangian(leaves, self.values, (x.detach(), labels, multipliers.detach()))
            grads = torch.autograd.grad(lagrangian, list(leaves.values()), materialize_grads=True)
        return margins.detach(), dict(zip(leaves, grads, strict=True))

    def set_direction(self, v: Mapping[str, Tensor], losses: Losses) -> None:
        """Prepare ``directional_sum``: q (tangents) and p (product adjoints) of the direction ``v`` and of ``losses``."""
        self.v, self.losses = v, losses
        self.tangents: list[Tensor] = []
        for layer in range(len(self.values)):
            self.tangents.append(self._total(functools.partial(self._tangent, layer=layer)))
        self.product_adjoints = [torch.zeros_like(s) for s in self.values]
        for layer in reversed(range(len(self.values))):
            self.product_adjoints[layer] = self._total(functools.partial(self._product_adjoint, layer=layer))

    def directional_sum(self, x: Tensor, labels: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """Margins of one micro-batch and R without the losses, with their graph with respect to x and mu."""
        with torch.enable_grad():
            return self._products([s.detach().requires_grad_() for s in self.values], (x, labels, multipliers))

    def _total(self, part: Callable[[MicroBatch], Tensor]) -> Tensor:
        """Sum of ``part`` over micro-batches and ranks."""
        with torch.enable_grad():
            parts = [part(micro_batch).detach() for micro_batch in self.micro_batches()]
        return self.reduce(torch.stack(parts).sum(0)).detach()

    def _leaves(self) -> dict[str, Tensor]:
        return {k: t.detach().requires_grad_() for k, t in self.theta.items()}

    def _measure(self) -> bool:
        """Append s of the next layer; return False if there is none."""
        found: list[tuple[int, Tensor, Tensor]] = []
        for x, _, _ in self.micro_batches():
            stats = PartialStats(self.values, self.centers, self.counts)
            with torch.no_grad():
                try:
                    self.phi(self.theta, x, stats)
                    return False
                except _LayerReached:
                    assert stats.stopped_input is not None
                    mean = stats.stopped_input.mean(0)
                    found.append((len(stats.stopped_input), mean, (stats.stopped_input - mean).square().sum(0)))
        one = found[0][1].new_ones(1)
        sums = self.reduce(torch.stack([torch.cat([n * mean, n * one]) for n, mean, _ in found]).sum(0))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        spread = torch.stack([squares + n * (own - mean).square() for n, own, squares in found]).sum(0)
        self.values.append(torch.stack([mean, self.reduce(spread) / count]))
        self.centers.append(mean)
        self.counts.append(count)
        return True

    def _lagrangian(
        self, theta: Mapping[str, Tensor], values: list[Tensor], micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Margins, L without the constant <lambda, s>, and c."""
        x, labels, multipliers = micro_batch
        stats = PartialStats(values, self.centers, self.counts)
        margins = pairwise_margins(self.phi(theta, x, stats), labels)
        self.moments = stats.moments
        terms = [(a * c).sum() for a, c in zip(self.adjoints, stats.parts, strict=True)]
        return margins, torch.stack([(multipliers * margins).sum(), *terms]).sum(), stats.parts

    def _adjoint(self, micro_batch: MicroBatch, layer: int) -> Tensor:
        """This micro-batch's part of lambda_l."""
        values = [s.requires_grad_(i == layer) for i, s in enumerate(t.detach() for t in self.values)]
        lagrangian = self._lagrangian(self.theta, values, micro_batch)[1]
        return torch.autograd.grad(lagrangian, values[layer], materialize_grads=True)[0]

    def _tangent(self, micro_batch: MicroBatch, layer: int) -> Tensor:
        """This micro-batch's part of q_l, by differentiating twice: d/dw <(v, q), d<w, c_l>/d(theta, s)>."""
        leaves, before = self._leaves(), [s.detach().requires_grad_() for s in self.values[:layer]]
        stats = PartialStats([*before, self.values[layer]], self.centers, self.counts, until=layer)
        with contextlib.suppress(_LayerReached):
            self.phi(leaves, micro_batch[0], stats)
        w = torch.zeros_like(self.values[layer]).requires_grad_()
        grads = torch.autograd.grad(
            (w * stats.parts[layer]).sum(), [*leaves.values(), *before], create_graph=True, allow_unused=True
        )
        seeds = [*(self.v[k] for k in leaves), *self.tangents[:layer]]
        moved = [(g * seed).sum() for g, seed in zip(grads, seeds, strict=True) if g is not None]
        return torch.autograd.grad(torch.stack(moved).sum(), w)[0] if moved else torch.zeros_like(w)

    def _products(self, values: list[Tensor], micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Margins, and R without the losses."""
        leaves = self._leaves()
        margins, lagrangian, parts = self._lagrangian(leaves, values, micro_batch)
        grads = torch.autograd.grad(lagrangian, [*leaves.values(), *values], create_graph=True, allow_unused=True)
        seeds = [*(self.v[k] for k in leaves), *self.tangents]
        terms = [(g * seed).sum() for g, seed in zip(grads, seeds, strict=True) if g is not None]
        terms += [(p * c).sum() for p, c in zip(self.product_adjoints, parts, strict=True)]
        return margins, torch.stack(terms).sum()

    def _product_adjoint(self, micro_batch: MicroBatch, layer: int) -> Tensor:
        """This micro-batch's part of p_l."""
        assert self.losses is not None
        values = [s.detach().requires_grad_() for s in self.values]
        margins, product = self._products(values, micro_batch)
        total = product + self.losses(margins, micro_batch[2], micro_batch[0], micro_batch[1])
        return torch.autograd.grad(total, values[layer], materialize_grads=True)[0]
