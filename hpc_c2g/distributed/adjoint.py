"""A differentiable sum over ranks: linear and its own adjoint, so that derivatives of every order are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_c2g.distributed.mesh import Mesh


class _Sum(torch.autograd.Function):
    """R(x_r) = sum_r x_r. If the loss is the sum of the ranks' losses, its adjoint is R, which backward calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        total = x.detach().clone(memory_format=torch.contiguous_format)
        mesh.world.with_rank_check(lambda: dist.all_reduce(total, group=mesh.data.group))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grads[0], ctx.mesh), None


def adjoint_sum(mesh: Mesh) -> Callable[[Tensor], Tensor]:
    """Return the sum over the data ranks of this process's group; collective in forward and in every backward, in graph order.

    Every rank must build the same graph, and no other collective of the group may run at the same time.
    """

    def total(x: Tensor) -> Tensor:
        if mesh.data.size == 1:
            return x
        out: Tensor = _Sum.apply(x, mesh)
        return out

    return total
