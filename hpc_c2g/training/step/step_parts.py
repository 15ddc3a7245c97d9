"""Parts of a training step: the engine's interface, this rank's share of each member, a micro-batch, and the sums over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from hpc_c2g.distributed.comm_stream import CommStream
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import ResidualSum, RunningSum, Summation, TreeSum
from hpc_c2g.generators.latents import Latents
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.step.objective import Objective
from hpc_c2g.training.step.sample_stats import SampleStats
from hpc_c2g.training.step.sharding import SampleRange

BUCKET_BYTES = 4 * 2**20
"""Size at which a bucket of G is sent, while the backward continues."""


class Engine(Protocol):
    """Interface of the engine that owns the generator."""

    module: nn.Module
    gathers_in_forward: bool
    """True if the module's forward is collective."""

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of ``surrogate``, a plain sum over samples, to the generator's."""

    def reduce(self) -> None:
        """Make the generator's gradient the sum over all micro-batches and ranks."""

    def gradient_norm(self) -> Tensor:
        """Norm of the reduced gradient, before it is used; the same on every rank."""

    def step(self, lr_factor: float) -> None:
        """Update the generator with the summed gradient and clear it."""


class Sampler(Protocol):
    """Draws latents of one member's part of the global batch."""

    def batch(self, step: int, start: int, stop: int) -> Latents:
        """Samples ``start`` to ``stop`` of the part at ``step`` (counted from 1)."""


@dataclass(frozen=True)
class MemberShard:
    """This rank's part of the work on one member.

    Attributes:
        member: Index of the member, one solution of one classifier.
        objective: Frozen classifier and loss of samples.
        sampler: Latents of its part of the global batch.
        micro_batches: Ranges within that part.
        G: Its KKT sum over this rank's data group.
    """

    member: int
    objective: Objective
    sampler: Sampler
    micro_batches: list[SampleRange]
    G: ResidualSum | TreeSum


@dataclass(frozen=True)
class Samples:
    """A micro-batch of the generator. The leaves carry the cotangents of x and mu back to it."""

    latents: Latents
    x: Tensor
    multipliers: Tensor
    x_leaf: Tensor
    multipliers_leaf: Tensor


@dataclass(frozen=True)
class StepResult:
    """Measurements of a step, on every rank: its scalars, and each member's sample statistics if they were requested."""

    scalars: dict[str, float]
    sample_stats: list[SampleStats]


def residual_sum(
    config: TrainConfig, mesh: Mesh, objective: Objective, comm_stream: CommStream
) -> ResidualSum | TreeSum:
    """Return the sum of one member's G over micro-batches and ranks, as configured."""
    if config.deterministic:
        return TreeSum(mesh.world)
    return ResidualSum(objective.theta, mesh, comm_stream, config.distributed.comm_dtype, BUCKET_BYTES)


def scalar_sum(config: TrainConfig, mesh: Mesh) -> Summation:
    """Return a small sum over micro-batches and all ranks, as configured."""
    return TreeSum(mesh.world, mesh.members) if config.deterministic else RunningSum(mesh.world)
