"""BatchNorm with the batch's own statistics in the graph, over all ranks that share the batch.

A net that was trained with batch statistics is stationary for the function that has them in its graph. With the mean and the biased
variance of each channel over all N positions of the whole batch,

    y = weight (x - mean) / sqrt(variance + eps) + bias,    mean = 1/N sum x,    variance = 1/N sum (x - mean)^2,

every output depends on every sample. Both sums go through a reduction R(x_r) = sum_r x_r. It is linear, and its own adjoint: where the
loss is the sum of the ranks' losses, the gradient of x_r is the sum of the gradients of all ranks' copies of R, which is R again. So first
and second derivatives are those of one graph over the whole batch, provided that every rank goes through the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hpc_c2g.errors import UserError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CALLS = {F.batch_norm, torch.batch_norm, torch.native_batch_norm}
Reduction = Callable[[Tensor], Tensor]
"""The sum over the ranks that share a batch: linear, self-adjoint, differentiable twice."""


def no_reduction(x: Tensor) -> Tensor:
    """The sum over a single process: ``x`` itself."""
    return x


@dataclass(frozen=True)
class Moments:
    """Statistics of one call of one BatchNorm: the batch's, with their graph, and the running ones; all ``[channels]``."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor
    eps: float


class Statistics(Protocol):
    """Callable that gives a BatchNorm its mean and variance instead of the running statistics."""

    def __call__(self, x: Tensor, running_mean: Tensor, running_variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and biased variance ``[channels]`` for an input ``[B, channels, *positions]``."""


@dataclass
class BatchStatistics:
    """Statistics of one batch in one graph.

    Attributes:
        reduce: Sum over the ranks that share the batch.
        moments: Statistics of each layer, in the order of the calls.
    """

    reduce: Reduction = no_reduction
    moments: list[Moments] = field(default_factory=list)

    def __call__(self, x: Tensor, running_mean: Tensor, running_variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and biased variance ``[channels]`` of ``x``; collective if the reduction is."""
        positions = flatten_positions(x)
        # ranks may hold different numbers of samples
        sums = self.reduce(torch.cat([positions.sum(0), x.new_full((1,), len(positions))]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        variance = self.reduce((positions - mean).square().sum(0)) / count
        self.moments.append(Moments(mean, variance, running_mean, running_variance, eps))
        return mean, variance


def flatten_positions(x: Tensor) -> Tensor:
    """``[B, channels, *positions]`` -> ``[all positions, channels]``."""
    return x if x.ndim == 2 else x.movedim(1, -1).flatten(0, -2)


class BatchNorm(nn.Module):
    """Replacement of a BatchNorm: frozen running statistics as in eval mode, unless ``statistics`` is set.

    The affine tensors stay parameters under their names; the running statistics are read, never written.
    """

    running_mean: Tensor
    running_var: Tensor

    # _BatchNorm is private, but the only common base class of the classes in NORMS; used for typing only
    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, name: str) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise UserError(
                f"the classifier's {name!r} ({type(norm).__name__}) keeps no running statistics:"
                f" track_running_stats={norm.track_running_stats}",
                "fit it with track_running_stats=True: outputs of single samples need them",
            )
        self.eps = norm.eps
        self.register_parameter("weight", norm.weight)
        self.register_parameter("bias", norm.bias)
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.statistics: Statistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalized input, in the input's shape ``[B, channels, *positions]``."""
        weight, bias = cast("Tensor | None", self.weight), cast("Tensor | None", self.bias)
        if self.statistics is None:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
        mean, variance = self.statistics(x, self.running_mean, self.running_var, self.eps)
        y = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if weight is not None:
            y = y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)


def has_batch_norm(model: nn.Module) -> bool:
    """Return True if ``model`` has a BatchNorm."""
    return any(type(m) in NORMS for m in model.modules())


def couples(model: nn.Module, statistics: str) -> bool:
    """Return True if the samples of a batch are coupled: ``model`` has a BatchNorm, and ``statistics`` are not frozen."""
    return statistics != "frozen" and has_batch_norm(model)


def replace_norms(model: nn.Module) -> list[BatchNorm]:
    """Replace every BatchNorm of torch in ``model`` by our ``BatchNorm``, in place; returns the new modules.

    Raises:
        UserError: a BatchNorm has no running statistics.
    """
    norms = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) in NORMS and name:
            parent, _, child = name.rpartition(".")
            norms.append(BatchNorm(cast(nn.modules.batchnorm._BatchNorm, module), name))
            setattr(model.get_submodule(parent), child, norms[-1])
    return norms


def refuse_functional_batch_norm(graph: fx.Graph, statistics: str) -> None:
    """Refuse a classifier that calls ``F.batch_norm`` itself, since a function call cannot be replaced.

    Raises:
        UserError: the graph calls ``F.batch_norm`` and statistics are not frozen.
    """
    called = [n for n in graph.nodes if n.op == "call_function" and n.target in _CALLS]
    if called and statistics != "frozen":
        raise UserError(
            f"stationarity.statistics={statistics} needs BatchNorm modules, but the classifier calls"
            f" {called[0].target.__name__} itself",
            "use torch.nn.BatchNorm1d or BatchNorm2d there, or give stationarity.statistics=frozen",
        )


@contextmanager
def use_statistics(norms: Iterable[BatchNorm], statistics: Statistics | None) -> Iterator[None]:
    """Context in which ``norms`` use and record the batch's statistics; None uses the frozen ones."""
    for norm in norms:
        norm.statistics = statistics
    try:
        yield
    finally:
        for norm in norms:
            norm.statistics = None  # it holds a graph
