"""Scaled margins and multipliers of a whole step, put together by sample index, for the quantiles that are logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_c2g.distributed.world import World
from hpc_c2g.kkt.margins import other_classes, smallest_margins


@dataclass(frozen=True)
class Bands:
    """Of one classifier.

    Attributes:
        margins: scaled runner-up margins e^a min_j m_ij, ``[B_k]``.
        multipliers: mu_ij B_k / S, j != y_i, ``[B_k (C_k - 1)]``.
    """

    margins: Tensor
    multipliers: Tensor


class BandCollector:
    """Collects one step's bands of every classifier; they do not depend on ranks or micro-batches.

    Args:
        batches: B_k.
        classes: C_k.
        world: all ranks.
    """

    def __init__(self, batches: Sequence[int], classes: Sequence[int], world: World) -> None:
        self.world = world
        # row i holds sample i's multipliers, and its margin in the place of its own class
        self.rows = [torch.zeros(B, C, device=world.device) for B, C in zip(batches, classes, strict=True)]
        self.labels = [torch.arange(B, device=world.device) % C for B, C in zip(batches, classes, strict=True)]

    def note(
        self, classifier: int, start: int, margins: Tensor, multipliers: Tensor, alpha: float, per_scale: float
    ) -> None:
        """One micro-batch: margins and multipliers ``[b, C]`` from sample ``start`` on; ``per_scale`` is B_k / S."""
        part = slice(start, start + len(margins))
        labels = self.labels[classifier][part]
        smallest = math.exp(alpha) * smallest_margins(margins.detach(), labels)
        rows = (multipliers.detach() * per_scale).scatter(1, labels[:, None], smallest[:, None])
        self.rows[classifier][part] = rows.to(self.rows[classifier])

    def close(self) -> list[Bands]:
        """All samples of all ranks; collective."""
        self.world.sum(self.rows)
        found = []
        for rows, labels in zip(self.rows, self.labels, strict=True):
            others = other_classes(labels, rows.shape[1])
            found.append(Bands(rows[~others], rows[others]))
        return found
