"""Sums over micro-batches and ranks: the residual all-reduce, small sums, and their slow twin with the same bits on any number of ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from hpc_c2g.distributed.bucket_sum import bucket_sum
from hpc_c2g.distributed.comm_stream import CommStream
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.world import World

Arrival = Callable[[str, Tensor], None]


class Summation(Protocol):
    """Adds up named tensors of fixed shapes, first over micro-batches, then over ranks."""

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's tensors (no graph is kept)."""

    def total(self) -> dict[str, Tensor]:
        """The sum over all micro-batches of all ranks, on every rank; starts afresh."""


class RunningSum:
    """Sums as they come, then one all-reduce over all ranks: for what is small."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sums: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's tensors."""
        if not self.sums:
            self.sums = {name: t.detach().clone() for name, t in tensors.items()}
            return
        for name, tensor in tensors.items():
            self.sums[name] += tensor.detach()

    def total(self) -> dict[str, Tensor]:
        """The sum over all ranks."""
        sums, self.sums = self.sums, {}
        self.world.sum(list(sums.values()))
        return sums


class TreeSum:
    """Sums a fixed number of virtual shards in a fixed binary tree: bitwise equal on every number of ranks that divides them.

    Every rank gathers every shard: memory and wire are ``deterministic_shards`` times those of the running sum.

    Args:
        world: the ranks; each adds its shards of one classifier after the other.
        classifiers: whose shards are added here: a tree each, then one after the other.
    """

    def __init__(self, world: World, classifiers: int = 1) -> None:
        self.world, self.classifiers = world, classifiers
        self.shards: list[dict[str, Tensor]] = []

    def micro_batch(self, last: bool) -> None:
        """Nothing to prepare: tensors come by ``add`` alone."""

    def take_bytes(self) -> int:
        """Not counted: it is for proofs, not for speed."""
        return 0

    def state(self) -> list[Tensor]:
        """Nothing is carried from step to step."""
        return []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add one virtual shard's tensors."""
        self.shards.append({name: t.detach().clone() for name, t in tensors.items()})

    def total(self) -> dict[str, Tensor]:
        """The sum over the trees."""
        shards, self.shards = self.shards, []
        own = torch.stack([torch.cat([t.reshape(-1) for t in shard.values()]) for shard in shards])
        layers = self.world.gather(own).reshape(self.world.size, self.classifiers, -1, own.shape[1]).transpose(0, 1)
        trees = [tree_sum(tree.flatten(0, 1)) for tree in layers]
        parts = torch.split(functools.reduce(torch.add, trees), [t.numel() for t in shards[0].values()])
        return {name: part.view_as(t) for part, (name, t) in zip(parts, shards[0].items(), strict=True)}


def tree_sum(layers: Tensor) -> Tensor:
    """Sum of ``[n, P]`` over n, a power of two, by adding neighbors; ``[P]``."""
    while len(layers) > 1:
        layers = layers[0::2] + layers[1::2]
    return layers[0]


class Bucket:
    """Some of the tensors of one sum in one flat piece of memory, in at least float32."""

    def __init__(self, like: Mapping[str, Tensor], multiple: int) -> None:
        first = next(iter(like.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        sizes = [t.numel() for t in like.values()]
        padding = -sum(sizes) % multiple
        self.flat = torch.zeros(sum(sizes) + padding, dtype=dtype, device=first.device)
        parts = torch.split(self.flat, [*sizes, padding])[:-1]
        self.views = {name: part.view_as(t) for part, (name, t) in zip(parts, like.items(), strict=True)}
        self.missing: set[str] = set()


class ResidualSum:
    """The residual all-reduce: G of one classifier, summed over micro-batches and its data ranks.

    A bucket leaves as soon as the last micro-batch's backward has filled it, while the rest of the backward goes on. Additions are
    in float32 at least, whatever the tensors' dtype.

    Args:
        like: G's names, shapes, dtype and device.
        mesh: the ranks.
        lane: where collectives run beside the computation; shared by all sums of a process.
        wire: ``float32`` or ``bfloat16``.
        bucket_bytes: a bucket is closed when it holds as much.
    """

    def __init__(
        self, like: Mapping[str, Tensor], mesh: Mesh, comm_stream: CommStream, comm_dtype: str, bucket_bytes: int
    ) -> None:
        self.names = list(like)
        self.world, self.comm_stream, self.size = mesh.world, comm_stream, mesh.data.size
        shared = (
            comm_dtype != "float32" or mesh.data.intra_node is not None
        )  # a bucket is then cut into a share per rank
        self.buckets = [Bucket(part, self.size if shared else 1) for part in _parts(like, bucket_bytes)]
        self.of = {name: bucket for bucket in self.buckets for name in bucket.views}
        self.sums = []
        if self.size > 1:
            self.sums = [bucket_sum(mesh.data, comm_dtype, len(b.flat), b.flat) for b in self.buckets]
        self.written: set[str] = set()
        self.sent = 0
        self.bytes = 0
        self._last = False
        self._arrived: set[str] = set()

    def micro_batch(self, last: bool) -> Arrival:
        """Begin one; full buckets leave during the last. Returns what takes a tensor as soon as the backward has it."""
        self._last, self._arrived = last, set()
        for bucket in self.buckets:
            bucket.missing = set(bucket.views)
        return self._arrive

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """The whole micro-batch: of it what did not arrive during the backward, tensors that the classifier does not use."""
        for name, tensor in tensors.items():
            if name not in self._arrived:
                self._arrive(name, tensor)

    def total(self) -> dict[str, Tensor]:
        """The sum over all ranks; valid until the next micro-batch begins."""
        if self.sums:
            self.world.with_rank_check(self.comm_stream.wait)
        self.sent, self.written = 0, set()
        return {name: self.of[name].views[name] for name in self.names}

    def _arrive(self, name: str, tensor: Tensor) -> None:
        bucket = self.of[name]
        with torch.no_grad():
            view = bucket.views[name]
            view.add_(tensor.detach()) if name in self.written else view.copy_(tensor.detach())
        self.written.add(name)
        self._arrived.add(name)
        bucket.missing.discard(name)
        # every rank sends the buckets in the same order, whichever is full first
        while self._last and self.sent < len(self.sums) and not self.buckets[self.sent].missing:
            self.comm_stream.submit(functools.partial(self._send, self.sent))
            self.sent += 1

    def _send(self, number: int) -> None:
        self.bytes += self.sums[number](self.buckets[number].flat)

    def take_bytes(self) -> int:
        """Payload handed to collectives since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken

    def state(self) -> list[Tensor]:
        """What the wire carries from step to step on this rank: rounding errors."""
        return list(itertools.chain.from_iterable(s.state() for s in self.sums))


def _parts(like: Mapping[str, Tensor], bucket_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors in the order in which a backward reaches them, the last layers first, cut into buckets."""
    parts: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in reversed(list(like.items())):
        size = tensor.numel() * max(4, tensor.element_size())
        if parts[-1] and filled + size > bucket_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += size
    return parts
