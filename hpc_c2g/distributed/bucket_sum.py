"""All-reduce of one bucket: flat, hierarchical (inside nodes first), or compressed to bfloat16 with error feedback."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_c2g.distributed.mesh import DataRanks, Group


class BucketSum(Protocol):
    """All-reduce of one bucket in place, step after step; the same bits on every rank."""

    def __call__(self, bucket: Tensor) -> int:
        """Replace ``bucket`` by its sum; returns the rank's payload in bytes (without the ring's factor)."""

    def state(self) -> list[Tensor]:
        """Tensors kept from step to step, for checkpoints."""


class FlatAllReduce:
    """One all-reduce in the bucket's own dtype."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, bucket: Tensor) -> int:
        """Sum in place."""
        dist.all_reduce(bucket, group=self.group)
        return bucket.numel() * bucket.element_size()

    def state(self) -> list[Tensor]:
        """Empty: no state is kept."""
        return []


class HierarchicalAllReduce:
    """Reduce-scatter inside the node, sum the shares across nodes, all-gather inside the node.

    Each link between nodes carries one share of the bucket.
    """

    def __init__(self, intra_node: Group, inter_node: BucketSum) -> None:
        self.intra_node, self.inter_node = intra_node, inter_node

    def __call__(self, bucket: Tensor) -> int:
        """Sum in place; the bucket's length must be a multiple of the number of ranks on a node."""
        share = bucket.new_empty(bucket.numel() // dist.get_world_size(self.intra_node))
        dist.reduce_scatter_tensor(share, bucket, group=self.intra_node)
        sent = self.inter_node(share)
        dist.all_gather_into_tensor(bucket, share, group=self.intra_node)
        return bucket.numel() * bucket.element_size() + sent

    def state(self) -> list[Tensor]:
        """State of the sum across nodes."""
        return self.inter_node.state()


class CompressedAllReduce:
    """bfloat16 communication, float32 additions, rounding errors fed back into the next step.

    Source: Seide et al. 2014; Karimireddy et al. 2019.

    Rank r sends bf16(share_s + error) of every share s to the share's owner, which adds them in float32 and sends bf16(sum + error)
    to all ranks. The rounding error of one step is added at the next, so that the mean over steps is exact.
    """

    def __init__(self, group: Group, numel: int, like: Tensor) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self.sent_error = like.new_zeros(numel)
        self.sum_error = like.new_zeros(numel // self.size)

    def __call__(self, bucket: Tensor) -> int:
        """Sum in place; the bucket's length must be a multiple of the number of ranks."""
        sent = _round_with_feedback(bucket, self.sent_error)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        total = received.view(self.size, -1).to(bucket.dtype).sum(0)
        dist.all_gather_into_tensor(sent, _round_with_feedback(total, self.sum_error), group=self.group)
        bucket.copy_(sent)
        return sent.numel() * sent.element_size()

    def state(self) -> list[Tensor]:
        """Rounding errors of the shares that this rank sent and of the share that it owns."""
        return [self.sent_error, self.sum_error]


def _round_with_feedback(values: Tensor, error: Tensor) -> Tensor:
    """Return bf16(values + error); ``error`` becomes the rounding error."""
    exact = values + error
    rounded = exact.to(torch.bfloat16)
    torch.sub(exact, rounded, out=error)
    return rounded


def bucket_sum(data: DataRanks, comm_dtype: str, numel: int, like: Tensor) -> BucketSum:
    """Return the all-reduce for the mesh and ``comm_dtype``; a hierarchical one compresses between nodes only.

    Args:
        data: Data ranks that sum the bucket.
        comm_dtype: ``float32`` sends the bucket's own dtype, ``bfloat16`` half the bytes.
        numel: Length of the bucket.
        like: Tensor with the bucket's dtype and device.
    """
    inter_node = data.group
    if data.intra_node is not None:
        inter_node, numel = data.inter_node, numel // dist.get_world_size(data.intra_node)
    flat: BucketSum = (
        CompressedAllReduce(inter_node, numel, like) if comm_dtype == "bfloat16" else FlatAllReduce(inter_node)
    )
    return flat if data.intra_node is None else HierarchicalAllReduce(data.intra_node, flat)
