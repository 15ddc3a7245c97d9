"""Sums over micro-batches and ranks: the residual all-reduce, and its slow twin with the same bits on any number of ranks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hpc_c2g.distributed.world import World


class Summation(Protocol):
    """Adds up lists of tensors of fixed shapes, first over micro-batches, then over ranks."""

    def add(self, tensors: list[Tensor]) -> None:
        """Add one micro-batch's tensors (no graph is kept)."""

    def total(self) -> list[Tensor]:
        """The sum over all micro-batches of all ranks, on every rank; starts afresh."""


class RunningSum:
    """Sums as they come, then one all-reduce: one copy of the tensors in memory, P numbers on the wire."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sums: list[Tensor] = []

    def add(self, tensors: list[Tensor]) -> None:
        """Add one micro-batch's tensors."""
        if not self.sums:
            self.sums = [t.detach().clone() for t in tensors]
            return
        for total, tensor in zip(self.sums, tensors, strict=True):
            total += tensor.detach()

    def total(self) -> list[Tensor]:
        """The sum over all ranks."""
        sums, self.sums = self.sums, []
        self.world.sum(sums)
        return sums


class TreeSum:
    """Sums a fixed number of virtual shards in a fixed binary tree: bitwise equal on every number of ranks that divides them.

    Every rank gathers every shard: memory and wire are ``virtual_shards`` times those of the running sum.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.shards: list[list[Tensor]] = []

    def add(self, tensors: list[Tensor]) -> None:
        """Add one virtual shard's tensors."""
        self.shards.append([t.detach().clone() for t in tensors])

    def total(self) -> list[Tensor]:
        """The sum over the tree."""
        shards, self.shards = self.shards, []
        layers = self.world.gather(torch.stack([torch.cat([t.reshape(-1) for t in shard]) for shard in shards]))
        parts = torch.split(tree_sum(layers), [t.numel() for t in shards[0]])
        return [part.view_as(t) for part, t in zip(parts, shards[0], strict=True)]


def tree_sum(layers: Tensor) -> Tensor:
    """Sum of ``[n, P]`` over n, a power of two, by adding neighbours; ``[P]``."""
    while len(layers) > 1:
        layers = layers[0::2] + layers[1::2]
    return layers[0]
