"""Sums over micro-batches and ranks: bucketed all-reduce of G, small sums, and a slow sum with the same bits on any number of ranks."""

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

OnReady = Callable[[str, Tensor], None]


class Summation(Protocol):
    """Sum of named tensors of fixed shapes, first over micro-batches, then over ranks."""

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's tensors (no graph is kept)."""

    def total(self) -> dict[str, Tensor]:
        """Return the sum over all micro-batches of all ranks, on every rank, and reset it."""


class RunningSum:
    """Running sum, then one all-reduce over all ranks: for small tensors."""

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
        """Return the sum over all ranks and reset it."""
        sums, self.sums = self.sums, {}
        self.world.sum(list(sums.values()))
        return sums


class TreeSum:
    """Sum of a fixed number of shards in a fixed binary tree: bitwise equal on every number of ranks that divides them.

    Every rank gathers every shard: memory and communication are ``deterministic_shards`` times those of the running sum.

    Args:
        world: Ranks of the sum; each adds its shards member by member.
        members: Number of members: one tree per member, then their sum.
    """

    def __init__(self, world: World, members: int = 1) -> None:
        self.world, self.members = world, members
        self.shards: list[dict[str, Tensor]] = []

    def micro_batch(self, last: bool) -> None:
        """Do nothing: tensors come by ``add`` only."""

    def take_bytes(self) -> int:
        """Return 0: bytes are not counted."""
        return 0

    def state(self) -> list[Tensor]:
        """Empty: no state is kept."""
        return []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add one shard's tensors."""
        self.shards.append({name: t.detach().clone() for name, t in tensors.items()})

    def total(self) -> dict[str, Tensor]:
        """Return the sum over the trees and reset it."""
        shards, self.shards = self.shards, []
        own = torch.stack([torch.cat([t.reshape(-1) for t in shard.values()]) for shard in shards])
        layers = self.world.gather(own).reshape(self.world.size, self.members, -1, own.shape[1]).transpose(0, 1)
        trees = [tree_sum(tree.flatten(0, 1)) for tree in layers]
        parts = torch.split(functools.reduce(torch.add, trees), [t.numel() for t in shards[0].values()])
        return {name: part.view_as(t) for part, (name, t) in zip(parts, shards[0].items(), strict=True)}


def tree_sum(layers: Tensor) -> Tensor:
    """Sum of ``[n, P]`` over n, a power of two, by adding neighbors; ``[P]``."""
    while len(layers) > 1:
        layers = layers[0::2] + layers[1::2]
    return layers[0]


class Bucket:
    """Several tensors of one sum in one flat buffer, in at least float32."""

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
    """Bucketed all-reduce of G of one member, summed over micro-batches and data ranks.

    A bucket is sent as soon as the last micro-batch's backward has filled it, so that communication overlaps with the rest of the
    backward. Additions are in float32 at least, whatever the tensors' dtype.

    Args:
        like: Tensors with G's names, shapes, dtype and device.
        mesh: Device mesh of the job.
        comm_stream: Queue of the collectives; shared by all sums of a process.
        comm_dtype: ``float32`` or ``bfloat16``.
        bucket_bytes: Largest size of a bucket.
    """

    def __init__(
        self, like: Mapping[str, Tensor], mesh: Mesh, comm_stream: CommStream, comm_dtype: str, bucket_bytes: int
    ) -> None:
        self.names = list(like)
        self.world, self.comm_stream, self.size = mesh.world, comm_stream, mesh.data.size
        # the bucket is then split into one share per rank
        split = comm_dtype != "float32" or mesh.data.intra_node is not None
        self.buckets = [Bucket(part, self.size if split else 1) for part in _split_into_buckets(like, bucket_bytes)]
        self.bucket_of = {name: bucket for bucket in self.buckets for name in bucket.views}
        self.sums = []
        if self.size > 1:
            self.sums = [bucket_sum(mesh.data, comm_dtype, len(b.flat), b.flat) for b in self.buckets]
        self.written: set[str] = set()
        self.sent = 0
        self.bytes = 0
        self._last = False
        self._received: set[str] = set()

    def micro_batch(self, last: bool) -> OnReady:
        """Begin a micro-batch; full buckets are sent during the last one. Returns the hook for tensors that the backward has computed."""
        self._last, self._received = last, set()
        for bucket in self.buckets:
            bucket.missing = set(bucket.views)
        return self._receive

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the micro-batch's tensors that the hook did not receive: those that the classifier does not use."""
        for name, tensor in tensors.items():
            if name not in self._received:
                self._receive(name, tensor)

    def total(self) -> dict[str, Tensor]:
        """Return the sum over all ranks; the tensors are valid until the next micro-batch begins."""
        if self.sums:
            self.world.with_rank_check(self.comm_stream.wait)
        self.sent, self.written = 0, set()
        return {name: self.bucket_of[name].views[name] for name in self.names}

    def _receive(self, name: str, tensor: Tensor) -> None:
        bucket = self.bucket_of[name]
        with torch.no_grad():
            view = bucket.views[name]
            view.add_(tensor.detach()) if name in self.written else view.copy_(tensor.detach())
        self.written.add(name)
        self._received.add(name)
        bucket.missing.discard(name)
        # all ranks send the buckets in the same order, whichever is full first
        while self._last and self.sent < len(self.sums) and not self.buckets[self.sent].missing:
            self.comm_stream.submit(functools.partial(self._send, self.sent))
            self.sent += 1

    def _send(self, number: int) -> None:
        self.bytes += self.sums[number](self.buckets[number].flat)

    def take_bytes(self) -> int:
        """Return the bytes passed to collectives since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken

    def state(self) -> list[Tensor]:
        """Rounding errors that this rank carries from step to step."""
        return list(itertools.chain.from_iterable(s.state() for s in self.sums))


def _split_into_buckets(like: Mapping[str, Tensor], bucket_bytes: int) -> list[dict[str, Tensor]]:
    """Split the tensors into buckets in the order of the backward, last layers first."""
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
