"""Moments E x and E x^2 per input entry over a whole step, of every member, for priors on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_c2g.distributed.reduction import Summation


class InputMoments:
    """Accumulator of the moments over micro-batches and ranks.

    Args:
        batches: Samples B_k of each member.
        shape: Shape of a sample.
        summation: Sum over all ranks.
        device: Device of the sums.
    """

    def __init__(self, batches: Sequence[int], shape: torch.Size, summation: Summation, device: torch.device) -> None:
        self.batches, self.summation = list(batches), summation
        self.empty = torch.zeros(len(self.batches), 2, *shape, device=device)

    def part(self, member: int, x: Tensor) -> Tensor:
        """Return the part of a micro-batch ``[b, *S]``: sums of x and x^2 over B_k, ``[2, *S]``."""
        return torch.stack([x.sum(0), x.square().sum(0)]) / self.batches[member]

    def add(self, member: int, x: Tensor) -> None:
        """Add one micro-batch."""
        own = self.part(member, x.detach())
        self.summation.add({"moments": self.empty.to(own).index_put((torch.tensor(member, device=own.device),), own)})

    def total(self) -> Tensor:
        """Return the moments ``[K, 2, *S]`` over all ranks, and reset the sums; collective."""
        return self.summation.total()["moments"]
