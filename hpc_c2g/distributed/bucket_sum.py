"""How one bucket is summed over ranks: all at once, inside nodes first, or with half the bytes and the error fed back."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_c2g.distributed.mesh import DataRanks, Group


class BucketSum(Protocol):
    """Sums one bucket in place over ranks, step after step; the same bits on every rank."""

    def __call__(self, bucket: Tensor) -> int:
        """Replace ``bucket`` by its sum; returns the payload in bytes (what a rank hands over, without the ring's factor)."""

    def state(self) -> list[Tensor]:
        """What is carried from step to step."""


class Plain:
    """One all-reduce in the bucket's own dtype."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, bucket: Tensor) -> int:
        """Sum in place."""
        dist.all_reduce(bucket, group=self.group)
        return bucket.numel() * bucket.element_size()

    def state(self) -> list[Tensor]:
        """Nothing."""
        return []


class Hierarchical:
    """Reduce-scatter inside the node, sum the shares across nodes, all-gather inside: each link between nodes carries one share."""

    def __init__(self, intra_node: Group, inter_node: BucketSum) -> None:
        self.intra_node, self.inter_node = intra_node, inter_node

    def __call__(self, bucket: Tensor) -> int:
        """Sum in place; the bucket's length must be a multiple of the ranks on a node."""
        share = bucket.new_empty(bucket.numel() // dist.get_world_size(self.intra_node))
        dist.reduce_scatter_tensor(share, bucket, group=self.intra_node)
        sent = self.inter_node(share)
        dist.all_gather_into_tensor(bucket, share, group=self.intra_node)
        return bucket.numel() * bucket.element_size() + sent

    def state(self) -> list[Tensor]:
        """Of the sum across nodes."""
        return self.inter_node.state()


class Compressed:
    """bfloat16 on the wire, float32 in every addition, the rounding errors fed back into the next step (Seide et al. 2014; Karimireddy
    et al. 2019).

    Rank r sends bf16(share_s + error) of every share s to the share's owner, who adds them in float32 and sends bf16(sum + error)
    back to all. What rounding takes away at one step is added at the next, so that the mean over steps is exact.
    """

    def __init__(self, group: Group, numel: int, like: Tensor) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self.sent_error = like.new_zeros(numel)
        self.sum_error = like.new_zeros(numel // self.size)

    def __call__(self, bucket: Tensor) -> int:
        """Sum in place; the bucket's length must be a multiple of the ranks."""
        outgoing = _rounded(bucket, self.sent_error)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        total = incoming.view(self.size, -1).to(bucket.dtype).sum(0)
        dist.all_gather_into_tensor(outgoing, _rounded(total, self.sum_error), group=self.group)
        bucket.copy_(outgoing)
        return outgoing.numel() * outgoing.element_size()

    def state(self) -> list[Tensor]:
        """The errors of what this rank sent and of the share that it owns."""
        return [self.sent_error, self.sum_error]


def _rounded(values: Tensor, error: Tensor) -> Tensor:
    """bf16(values + error); ``error`` becomes what the rounding takes away."""
    wanted = values + error
    short = wanted.to(torch.bfloat16)
    torch.sub(wanted, short, out=error)
    return short


def bucket_sum(data: DataRanks, comm_dtype: str, numel: int, like: Tensor) -> BucketSum:
    """The sum that the mesh and ``comm_dtype`` ask for; between nodes alone where it is hierarchical.

    Args:
        data: the ranks.
        wire: ``float32`` sends the bucket's own dtype, ``bfloat16`` half of it.
        numel: length of the bucket.
        like: a tensor of the bucket's dtype and device.
    """
    inter_node = data.group
    if data.intra_node is not None:
        inter_node, numel = data.inter_node, numel // dist.get_world_size(data.intra_node)
    flat: BucketSum = Compressed(inter_node, numel, like) if comm_dtype == "bfloat16" else Plain(inter_node)
    return flat if data.intra_node is None else Hierarchical(data.intra_node, flat)
