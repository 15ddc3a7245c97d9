"""One training step, as the method reads: sample, KKT sum, reduce, cotangents, step."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpc_c2g.distributed.adjoint import adjoint_sum
from hpc_c2g.distributed.comm_stream import CommStream
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import ResidualSum, RunningSum, TreeSum
from hpc_c2g.generators.latents import Latents, LatentSampler
from hpc_c2g.kkt import alpha_control, duality
from hpc_c2g.kkt.coupled import CoupledSum, MicroBatch
from hpc_c2g.kkt.normalization import BatchStatistics
from hpc_c2g.kkt.stationarity import cotangents
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.step.input_moments import InputMoments
from hpc_c2g.training.step.objective import Objective
from hpc_c2g.training.step.phases import Phases
from hpc_c2g.training.step.sample_stats import SampleStats, SampleStatsCollector
from hpc_c2g.training.step.schedules import gate_width, lr_factor, own_scale
from hpc_c2g.training.step.sharding import SampleRange, Sharding
from hpc_c2g.training.step.step_metrics import MetricAccumulator, micro_batch_scalars, rho


class Engine(Protocol):
    """What a step needs of the engine that owns the generator."""

    module: nn.Module
    gathers_in_forward: bool
    """Whether the module's forward is collective."""

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of ``surrogate``, a plain sum over samples, to the generator's."""

    def reduce(self) -> None:
        """Make the generator's gradient the sum over all micro-batches and ranks."""

    def gradient_norm(self) -> Tensor:
        """Of the reduced gradient, before it is used; the same on every rank."""

    def step(self, lr_factor: float) -> None:
        """Update the generator with the summed gradient and clear it."""


@dataclass(frozen=True)
class MemberShard:
    """One classifier's part of the work of this rank.

    Attributes:
        classifier: its index.
        objective: its frozen side.
        sampler: of its part of the global batch.
        pieces: micro-batches, as ranges within that part.
        G: its KKT sum over this rank's data group.
    """

    classifier: int
    objective: Objective
    sampler: LatentSampler
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
    """What a step measured, on every rank: its scalars, and where they were asked for the bands of each classifier."""

    scalars: dict[str, float]
    sample_stats: list[SampleStats]


class TrainStep:
    """Carries each classifier's alpha from step to step; everything else is a function of (step, weights).

    Args:
        config: of the run.
        objectives: of this rank's classifiers, by index.
        samplers: by index.
        classes: C_k of every classifier.
        account: of every classifier's scalars, of those too that other ranks work on.
        engine: owns the generator.
        mesh: the ranks.
        sharding: this rank's part.
        alpha0: where each classifier's alpha starts.

    Attributes:
        phases: where the time goes.
    """

    def __init__(
        self,
        config: TrainConfig,
        objectives: Mapping[int, Objective],
        samplers: Mapping[int, LatentSampler],
        classes: Sequence[int],
        accumulator: MetricAccumulator,
        engine: Engine,
        mesh: Mesh,
        sharding: Sharding,
        alpha0: list[float],
    ) -> None:
        self.config, self.accumulator, self.engine, self.mesh = config, accumulator, engine, mesh
        self.alpha, self.alpha0 = list(alpha0), list(alpha0)
        self.one_pass, self.batches, self.classes = sharding.one_pass, sharding.batches, list(classes)
        self.comm_stream, self.phases = CommStream(mesh.world.device), Phases(mesh.world.device)
        self.coupled = any(objectives[k].coupled for k in mesh.local_members)
        # the last micro-batch's graph is at hand when G is known: no need to make it again. Of several classifiers the others' G would
        # come first, beside it; a proof of equal bits must do the same with every micro-batch
        self.keeps_last = not (
            self.coupled or config.deterministic or engine.gathers_in_forward or len(mesh.local_members) > 1
        )
        settings = config.distributed
        bucket_bytes = int(settings.bucket_mib * 2**20)
        self.shares = [
            MemberShard(
                k,
                objectives[k],
                samplers[k],
                sharding.micro_batches[k],
                TreeSum(mesh.world)
                if config.deterministic
                else ResidualSum(objectives[k].theta, mesh, self.comm_stream, settings.comm_dtype, bucket_bytes),
            )
            for k in mesh.local_members
        ]
        self.moments = self._input_moments() if config.prior.mean or config.prior.deviation else None

    def state_dict(self) -> dict[str, Any]:
        """Every alpha and where it started, and what each rank's wire carries from step to step; collective."""
        errors = [t.cpu() for t in self._wire_errors()]
        carried = self.mesh.world.gather_to_rank0(errors) if self.config.distributed.comm_dtype != "float32" else []
        return {"alpha": list(self.alpha), "alpha0": list(self.alpha0), "wire": carried}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; on other ranks, groups or buckets the wire starts without errors."""
        self.alpha, self.alpha0 = list(state["alpha"]), list(state["alpha0"])
        carried, errors = state.get("wire", []), self._wire_errors()
        if len(carried) == self.mesh.world.size:
            own = carried[self.mesh.world.rank]
            if [t.shape for t in own] == [t.shape for t in errors]:
                for error, kept in zip(errors, own, strict=True):
                    error.copy_(kept)

    def _wire_errors(self) -> list[Tensor]:
        return [error for share in self.shares for error in share.G.state()]

    def __call__(self, step: int, watch: bool = False, lr_scale: float = 1.0) -> StepResult:
        """Train on the global batch of ``step`` (counted from 1); ``watch`` collects bands too, ``lr_scale`` is a factor on the rates.

        Raises:
            UserError: a term is not finite; on every rank, before the update.
        """
        config, phases = self.config, self.phases
        phases.enter("kkt_sum")
        gamma = gate_width(config.gates, step, config.steps)
        own = own_scale(config.stationarity, step, config.steps)
        scales = [share.objective.multiplier_scale(self.alpha[share.classifier]) for share in self.shares]
        sample_stats = self._collector() if watch else None
        kept: dict[int, tuple[Samples, Tensor, dict[str, Tensor]]] = {}
        statistics: dict[int, BatchStatistics | CoupledSum | None] = {}

        for share, S in zip(self.shares, scales, strict=True):
            coupling = statistics[share.classifier] = self._statistics(share, step, S, gamma)
            for micro_batch in share.micro_batches:
                last = micro_batch == share.micro_batches[-1]
                keeps = self.one_pass or (last and self.keeps_last)
                samples = self._draw(share, step, micro_batch, S, keep_graph=keeps)
                on_ready = share.G.micro_batch(last)
                margins, G = share.objective.kkt_sum(
                    gamma,
                    samples.x_leaf,
                    samples.latents.labels,
                    samples.multipliers_leaf,
                    keep_graph=keeps,
                    on_ready=None if coupling else on_ready,
                    statistics=coupling,
                )
                share.G.add(G)
                if self.moments:
                    self.moments.add(share.classifier, samples.x_leaf)
                if self.coupled:  # the statistics' sums must not meet buckets on their way
                    self.mesh.world.with_rank_check(self.comm_stream.wait)
                if keeps:
                    kept[share.classifier] = samples, margins, G
        moments = self._moments_of_all()

        for share, S in zip(self.shares, scales, strict=True):
            k, objective, alpha = share.classifier, share.objective, self.alpha[share.classifier]
            phases.enter("all_reduce")
            residual = objective.residual(share.G.total(), alpha, own)
            phases.enter("cotangents")
            coupling = statistics.pop(k)
            losses_of = functools.partial(
                objective.sample_losses,
                alpha=alpha,
                reference=self._reference(share, step),
                statistics=coupling,
                moments=None if moments is None else moments[k],
            )
            micro = coupling if isinstance(coupling, CoupledSum) else None
            if micro is not None:
                micro.set_direction(residual.direction, lambda *micro_batch, of=losses_of: _total(of(*micro_batch)))
            for micro_batch in (
                reversed(share.micro_batches) if self.keeps_last else share.micro_batches
            ):  # the kept one first
                if k in kept:
                    samples, margins, products = kept.pop(k)
                    seeds = residual.direction
                else:  # <v, G> alone is cheaper than G
                    samples = self._draw(share, step, micro_batch, S, keep_graph=True)
                    margins, product = objective.directional_sum(
                        gamma, residual, samples.x_leaf, samples.latents.labels, samples.multipliers_leaf, micro
                    )
                    products, seeds = {"<v, G>": product}, {"<v, G>": torch.ones_like(product)}
                losses = losses_of(margins, samples.multipliers_leaf, samples.x_leaf, samples.latents.labels)
                gx, gmu = cotangents(
                    products,
                    seeds,
                    [samples.x_leaf, samples.multipliers_leaf],
                    _total(losses),
                )
                # the loss of several classifiers is the mean of theirs
                surrogate = torch.dot(samples.x.flatten(), gx.flatten()) + (samples.multipliers * gmu).sum()
                self.engine.backward(surrogate / self.mesh.members)
                self.accumulator.add(
                    k, micro_batch_scalars(micro_batch, residual, losses, margins, samples.multipliers, S, gx, gmu)
                )
                if sample_stats is not None:
                    x = objective.within_box(samples.x_leaf)
                    sample_stats.record(k, micro_batch[0], x, margins, samples.multipliers, alpha, objective.batch / S)
        self.engine.reduce()

        phases.enter("all_reduce")
        figures, norm = self.accumulator.reduce(step, self.engine.gradient_norm())
        phases.enter("optimizer")
        scalars = self.accumulator.summarize(figures, self.alpha, norm, config.stationarity.weight)
        self.engine.step(lr_scale * lr_factor(config.optimizer, step, config.steps))
        self._follow(figures)
        phases.stop()
        return StepResult({**scalars, **self._wire()}, sample_stats.gather() if sample_stats else [])

    def _draw(self, share: MemberShard, step: int, micro_batch: SampleRange, S: float, keep_graph: bool) -> Samples:
        """The samples of one micro-batch and their multipliers."""
        objective = share.objective
        if self.engine.gathers_in_forward:  # two collectives at once could meet in another order on another rank
            self.mesh.world.with_rank_check(self.comm_stream.wait)
        latents = share.sampler.batch(step, *micro_batch).to(self.mesh.world.device)
        with torch.set_grad_enabled(keep_graph):
            x, h = self.engine.module(latents)
            x, h = x.to(objective.lower), h[:, : objective.classes].to(objective.lower)
            mu = duality.multipliers_from(h, latents.labels, S, objective.batch)
        return Samples(latents, x, mu, x.detach().requires_grad_(), mu.detach().requires_grad_())

    def _statistics(self, share: MemberShard, step: int, S: float, gamma: float) -> BatchStatistics | CoupledSum | None:
        """What couples the samples of a classifier's batch, None where nothing does; collective."""
        if not share.objective.coupled:
            return None
        if self.one_pass:
            return BatchStatistics(adjoint_sum(self.mesh))

        def micro_batches() -> Iterator[MicroBatch]:
            for micro_batch in share.micro_batches:
                samples = self._draw(share, step, micro_batch, S, keep_graph=False)
                yield samples.x, samples.latents.labels, samples.multipliers

        return share.objective.coupled_sum(gamma, micro_batches, adjoint_sum(self.mesh))

    def _input_moments(self) -> InputMoments:
        world, shape = self.mesh.world, next(share.objective for share in self.shares).lower.shape
        summation = TreeSum(world, len(self.batches)) if self.config.deterministic else RunningSum(world)
        return InputMoments(self.batches, shape, summation, world.device)

    def _moments_of_all(self) -> Tensor | None:
        """E x and E x^2 of every classifier's samples ``[K, 2, *S]``, None where no prior asks for them; collective."""
        if self.moments is None:
            return None
        self.mesh.world.with_rank_check(
            self.comm_stream.wait
        )  # two collectives at once could meet in another order on another rank
        return self.moments.total()

    def _collector(self) -> SampleStatsCollector:
        shape = next(share.objective for share in self.shares).lower.shape
        return SampleStatsCollector(self.batches, self.classes, shape, self.mesh.world)

    def _reference(self, share: MemberShard, step: int) -> tuple[Tensor, Tensor] | None:
        """The samples that repel: the first of the classifier's batch, drawn again because they may be another rank's."""
        if not self.config.prior.repulsion:
            return None
        count = min(self.config.prior.repulsion_references, share.objective.batch)
        latents = share.sampler.batch(step, 0, count).to(self.mesh.world.device)
        with torch.no_grad():
            x = self.engine.module(latents)[0].to(share.objective.lower)
        return x, latents.labels

    def _follow(self, figures: list[dict[str, float]]) -> None:
        """Every alpha follows its rho, on every rank."""
        settings = self.config.alpha
        self.alpha = [
            alpha_control.feedback(
                alpha, start, rho(own, alpha), settings.max_change, settings.target_rho, settings.gain
            )
            for alpha, start, own in zip(self.alpha, self.alpha0, figures, strict=True)
        ]

    def _wire(self) -> dict[str, float]:
        """What the residual all-reduce of this rank sent and took, and the share of its time that hid behind the computation."""
        busy, exposed = self.comm_stream.seconds()
        sent = sum(share.G.take_bytes() for share in self.shares)
        return {"wire/bytes": float(sent), "wire/seconds": busy, "wire/hidden": 1 - exposed / busy if busy else 0.0}


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()
