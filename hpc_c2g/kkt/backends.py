"""How the KKT sum of one batch is computed: through autograd, in closed form, or over micro-batches that batch statistics couple.

All three give the same G and the same cotangents, to rounding. The third, ``CoupledSum``, is in ``coupled``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from hpc_c2g.kkt import directional, stationarity
from hpc_c2g.kkt.closed_form import MLPClosedForm
from hpc_c2g.kkt.coupled import Losses
from hpc_c2g.kkt.normalization import BatchStatistics, Moments
from hpc_c2g.kkt.stationarity import Classifier, OnReady


class KKTBackend(Protocol):
    """The KKT sum of one classifier's batch in one step, a micro-batch at a time.

    First ``kkt_sum`` for every micro-batch; then ``set_direction`` with the direction from the global G; then ``directional_sum`` for
    every micro-batch whose graph was not kept.
    """

    @property
    def moments(self) -> Sequence[Moments]:
        """Batch statistics of the samples evaluated last, one entry per BatchNorm; empty where statistics are frozen."""

    def kkt_sum(
        self, x: Tensor, labels: Tensor, multipliers: Tensor, keep_graph: bool = False, on_ready: OnReady | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Margins ``[b, C]`` and G of one micro-batch; arguments as those of ``stationarity.kkt_sum``."""

    def set_direction(self, v: Mapping[str, Tensor], losses: Losses) -> None:
        """Take the direction ``v`` and the sample losses that ``directional_sum`` needs; collective where samples are coupled."""

    def directional_sum(self, x: Tensor, labels: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """Margins ``[b, C]`` of one micro-batch and <v, G>, with their graph with respect to x and mu."""


class Autograd:
    """KKT sums of any classifier by differentiating it twice.

    Args:
        phi: Classifier with smooth gates.
        theta: Its parameters.
        statistics: Batch statistics that ``phi`` takes where it couples the samples of a batch held at once; None otherwise.
    """

    def __init__(self, phi: Classifier, theta: Mapping[str, Tensor], statistics: BatchStatistics | None = None) -> None:
        self.phi, self.theta, self.statistics = phi, theta, statistics

    @property
    def moments(self) -> Sequence[Moments]:
        """Batch statistics of the samples evaluated last."""
        return self.statistics.moments if self.statistics else ()

    def kkt_sum(
        self, x: Tensor, labels: Tensor, multipliers: Tensor, keep_graph: bool = False, on_ready: OnReady | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Margins and G of one micro-batch."""
        if self.statistics:  # the backward sums statistics over ranks: no bucket may be sent meanwhile
            on_ready = None
        return stationarity.kkt_sum(self.phi, self.theta, x, labels, multipliers, keep_graph, on_ready)

    def set_direction(self, v: Mapping[str, Tensor], losses: Losses) -> None:
        """Take the direction."""
        self.v = v

    def directional_sum(self, x: Tensor, labels: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """Margins and <v, G> of one micro-batch."""
        return directional.directional_sum(self.phi, self.theta, self.v, x, labels, multipliers)


class ClosedForm:
    """KKT sums of a flatten(1) and a chain of linear maps and gates, without autograd's graph.

    Args:
        mlp: Closed form of the classifier.
        widths: Width of each gate.
    """

    moments: Sequence[Moments] = ()

    def __init__(self, mlp: MLPClosedForm, widths: Mapping[str, float]) -> None:
        self.mlp, self.widths = mlp, widths

    def kkt_sum(
        self, x: Tensor, labels: Tensor, multipliers: Tensor, keep_graph: bool = False, on_ready: OnReady | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Margins and G of one micro-batch."""
        return self.mlp.kkt_sum(self.widths, x, labels, multipliers, keep_graph, on_ready)

    def set_direction(self, v: Mapping[str, Tensor], losses: Losses) -> None:
        """Take the direction."""
        self.v = v

    def directional_sum(self, x: Tensor, labels: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """Margins and <v, G> of one micro-batch."""
        return self.mlp.directional_sum(self.widths, self.v, x, labels, multipliers)
