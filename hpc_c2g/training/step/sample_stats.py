"""Statistics of a step's samples, in the order of their index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_c2g.distributed.world import World
from hpc_c2g.kkt.margins import other_classes, smallest_margins

ENTRIES = 2**17
"""Largest number of entries of the samples kept: enough for every logged statistic, little to communicate."""


@dataclass(frozen=True)
class SampleStats:
    """Sample statistics of one member.

    Attributes:
        margins: Scaled runner-up margins e^a min_j m_ij, ``[B_k]``.
        multipliers: Relative multipliers mu_ij B_k / S, j != y_i, ``[B_k, C_k - 1]``.
        labels: Labels y_i, ``[B_k]``.
        samples: First samples, in 0..1 within the box, ``[n, *S]``.
    """

    margins: Tensor
    multipliers: Tensor
    labels: Tensor
    samples: Tensor


def samples_kept(batch: int, classes: int, entries: int) -> int:
    """Return the number of samples of a batch that are kept: at most ``ENTRIES`` entries, but eight of each class if there are as many."""
    return min(batch, max(8 * classes, ENTRIES // max(1, entries)))


class SampleStatsCollector:
    """Collector of one step's statistics of every member; they do not depend on ranks or micro-batches.

    Args:
        batches: Samples B_k of each member.
        classes: Classes C_k of each member.
        shape: Shape of a sample.
        world: All ranks.
    """

    def __init__(self, batches: Sequence[int], classes: Sequence[int], shape: torch.Size, world: World) -> None:
        self.world = world
        device = world.device
        # row i holds sample i's multipliers, and its margin in the place of its own class
        self.rows = [torch.zeros(B, C, device=device) for B, C in zip(batches, classes, strict=True)]
        self.labels = [torch.arange(B, device=device) % C for B, C in zip(batches, classes, strict=True)]
        self.samples = [
            torch.zeros(samples_kept(B, C, shape.numel()), *shape, device=device)
            for B, C in zip(batches, classes, strict=True)
        ]

    def record(
        self,
        member: int,
        start: int,
        x: Tensor,
        margins: Tensor,
        multipliers: Tensor,
        alpha: float,
        per_scale: float,
    ) -> None:
        """Record one micro-batch that begins at sample ``start``.

        Args:
            member: Index of the member.
            start: Index of the first sample.
            x: Samples in 0..1 within the box, ``[b, *S]``.
            margins: Margins ``[b, C]``.
            multipliers: Multipliers ``[b, C]``.
            alpha: Scale alpha.
            per_scale: Factor B_k / S.
        """
        part = slice(start, start + len(margins))
        labels = self.labels[member][part]
        smallest = math.exp(alpha) * smallest_margins(margins.detach(), labels)
        rows = (multipliers.detach() * per_scale).scatter(1, labels[:, None], smallest[:, None])
        self.rows[member][part] = rows.to(self.rows[member])
        kept = self.samples[member][part]
        kept.copy_(x.detach()[: len(kept)])

    def gather(self) -> list[SampleStats]:
        """Return all samples of all ranks; collective."""
        self.world.sum([*self.rows, *self.samples])
        found = []
        for rows, labels, samples in zip(self.rows, self.labels, self.samples, strict=True):
            others = other_classes(labels, rows.shape[1])
            found.append(SampleStats(rows[~others], rows[others].reshape(len(rows), -1), labels, samples))
        return found
