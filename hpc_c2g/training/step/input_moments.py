"""E x and E x^2 per input entry over a whole step, of every member: sums that priors on the batch are functions of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_c2g.distributed.reduction import Summation


class InputMoments:
    """Adds up micro-batches and ranks.

    Args:
        batches: B_k.
        shape: of a sample.
        summation: over all ranks.
        device: of the sums.
    """

    def __init__(self, batches: Sequence[int], shape: torch.Size, summation: Summation, device: torch.device) -> None:
        self.batches, self.summation = list(batches), summation
        self.empty = torch.zeros(len(self.batches), 2, *shape, device=device)

    def part(self, member: int, x: Tensor) -> Tensor:
        """Part of a micro-batch ``[b, *S]``: sums of x and x^2 over B_k, ``[2, *S]``."""
        return torch.stack([x.sum(0), x.square().sum(0)]) / self.batches[member]

    def add(self, member: int, x: Tensor) -> None:
        """Add one micro-batch's."""
        own = self.part(member, x.detach())
        self.summation.add({"moments": self.empty.to(own).index_put((torch.tensor(member, device=own.device),), own)})

    def total(self) -> Tensor:
        """``[K, 2, *S]`` over all ranks; collective, starts afresh."""
        return self.summation.total()["moments"]
