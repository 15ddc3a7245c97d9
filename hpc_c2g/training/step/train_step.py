"""One training step in the order of the method: sample, KKT sum, reduce, cotangents, step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.distributed.adjoint import adjoint_sum
from hpc_c2g.distributed.comm_stream import CommStream
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import ResidualSum, RunningSum, Summation, TreeSum
from hpc_c2g.generators.config import LATENT_DIMENSIONS
from hpc_c2g.generators.latents import LatentSampler
from hpc_c2g.kkt import alpha_control, duality
from hpc_c2g.kkt.backends import KKTBackend
from hpc_c2g.kkt.coupled import MicroBatch
from hpc_c2g.kkt.loss_terms import INPUT_MOMENTS
from hpc_c2g.kkt.stationarity import cotangents
from hpc_c2g.monitoring.step_scalars import rho
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.step.bundles import class_counts
from hpc_c2g.training.step.input_moments import InputMoments
from hpc_c2g.training.step.objective import Objective, active_terms
from hpc_c2g.training.step.phases import Phases
from hpc_c2g.training.step.sample_stats import SampleStatsCollector
from hpc_c2g.training.step.schedules import gate_width, lr_factor, own_scale
from hpc_c2g.training.step.sharding import SampleRange, Sharding, shard
from hpc_c2g.training.step.step_metrics import MetricAccumulator, micro_batch_scalars
from hpc_c2g.training.step.step_parts import (
    Engine,
    MemberShard,
    Sampler,
    Samples,
    StepResult,
    residual_sum,
    scalar_sum,
)


class TrainStep:
    """Carries each member's alpha from step to step; everything else is a function of (step, weights).

    ``build`` assembles one.

    Args:
        config: Settings of the run.
        shares: This rank's part of the work, one entry per local member.
        accumulator: Scalars of all members, including those that other ranks work on.
        engine: Engine that owns the generator.
        mesh: The ranks.
        sharding: This rank's part of the batch.
        classes: C_k of every member.
        alpha0: Start of each member's alpha.
        comm_stream: Stream of the collectives that run beside the computation.
        keep_last_graph: Keep the last micro-batch's graph until G is known, if that is possible.

    Attributes:
        phases: Time spent in each phase.
    """

    def __init__(
        self,
        config: TrainConfig,
        shares: Sequence[MemberShard],
        accumulator: MetricAccumulator,
        engine: Engine,
        mesh: Mesh,
        sharding: Sharding,
        classes: Sequence[int],
        alpha0: Sequence[float],
        comm_stream: CommStream,
        keep_last_graph: bool = True,
    ) -> None:
        self.config, self.shares, self.accumulator, self.engine, self.mesh = config, shares, accumulator, engine, mesh
        self.alpha, self.alpha0 = list(alpha0), list(alpha0)
        self.one_pass, self.batches, self.classes = sharding.one_pass, sharding.batches, list(classes)
        self.comm_stream, self.phases = comm_stream, Phases(mesh.world.device)
        self.coupled = any(share.objective.coupled for share in shares)
        # the last micro-batch's graph is kept until G is known, so that it is not recomputed. Of several members the others' G would
        # come first, beside it; a proof of equal bits must do the same with every micro-batch
        self.keeps_last = keep_last_graph and not (
            self.coupled or config.deterministic or engine.gathers_in_forward or len(shares) > 1
        )
        needed = {need for share in shares for term in share.objective.terms for need in term.needs}
        self.moments = self._input_moments() if INPUT_MOMENTS in needed else None

    @classmethod
    def build(
        cls,
        config: TrainConfig,
        bundles: Sequence[Bundle],
        engine: Engine,
        mesh: Mesh,
        alpha0: Sequence[float] | None = None,
        *,
        micro_batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        objectives: Mapping[int, Objective] | None = None,
        sampler: Callable[[int], Sampler] | None = None,
        residual_sum: Callable[..., ResidualSum | TreeSum] = residual_sum,
        scalar_sum: Callable[..., Summation] = scalar_sum,
        keep_last_graph: bool = True,
    ) -> TrainStep:
        """Assemble the step of a run on this rank; collective.

        Args:
            config: Settings of the run.
            bundles: Classifier of each member.
            engine: Engine that owns the generator.
            mesh: The ranks.
            alpha0: Start of each member's alpha; None takes the estimate from probes, for runs whose members are all local.
            micro_batch: Samples whose graph is held at once; None for no limit.
            dtype: Data type of the KKT sums.
            objectives: Objective of each local member; None builds them.
            sampler: Latents of a member, by its index; None draws those of the run.
            residual_sum: Sum of one member's G.
            scalar_sum: Sum of the scalars.
            keep_last_graph: Argument of the constructor.

        Raises:
            UserError: The objective refuses a classifier, or the samples cannot be sharded; on every rank.
        """
        world, classes = mesh.world, class_counts(bundles)
        sharding = shard(config, classes, mesh, micro_batch)
        batches = sharding.batches
        if objectives is None:
            objectives = world.raise_on_all_ranks(
                lambda: {k: Objective(bundles[k], config, batches[k], world.device, dtype) for k in mesh.local_members}
            )

        def of_the_run(k: int) -> Sampler:
            return LatentSampler(LATENT_DIMENSIONS, classes[k], batches[k], config.seed, k)

        comm_stream = CommStream(world.device)
        shares = [
            MemberShard(
                k,
                objectives[k],
                (sampler or of_the_run)(k),
                sharding.micro_batches[k],
                residual_sum(config, mesh, objectives[k], comm_stream),
            )
            for k in mesh.local_members
        ]
        accumulator = MetricAccumulator(
            [list(bundle.parameters) for bundle in bundles],
            [[term.name for term in active_terms(config, bundle)] for bundle in bundles],
            scalar_sum(config, mesh),
            world.device,
            config.prefixes,
        )
        if alpha0 is None:
            alpha0 = [share.objective.initial_alpha() for share in shares]
        return cls(config, shares, accumulator, engine, mesh, sharding, classes, alpha0, comm_stream, keep_last_graph)

    def state_dict(self) -> dict[str, Any]:
        """Return every alpha and its start, and the error feedback of each rank's wire; collective."""
        errors = [t.cpu() for t in self._wire_errors()]
        carried = self.mesh.world.gather_to_rank0(errors) if self.config.distributed.comm_dtype != "float32" else []
        return {"alpha": list(self.alpha), "alpha0": list(self.alpha0), "wire": carried}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of ``state_dict``; on other ranks, groups or buckets the wire starts without errors."""
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
        """Train on the global batch of ``step`` (counted from 1); ``watch`` collects sample statistics, ``lr_scale`` scales the rates.

        Raises:
            UserError: A term is not finite; on every rank, before the update.
        """
        config, phases = self.config, self.phases
        phases.enter("kkt_sum")
        gamma = gate_width(step, config.steps)
        own = own_scale(step, config.steps)
        scales = [share.objective.multiplier_scale(self.alpha[share.member]) for share in self.shares]
        sample_stats = self._collector() if watch else None
        kept: dict[int, tuple[Samples, Tensor, dict[str, Tensor]]] = {}
        backends: dict[int, KKTBackend] = {}

        for share, S in zip(self.shares, scales, strict=True):
            backend = backends[share.member] = self._kkt_backend(share, step, S, gamma)
            for micro_batch in share.micro_batches:
                last = micro_batch == share.micro_batches[-1]
                keeps = self.one_pass or (last and self.keeps_last)
                samples = self._draw(share, step, micro_batch, S, keep_graph=keeps)
                on_ready = share.G.micro_batch(last)
                margins, G = backend.kkt_sum(
                    samples.x_leaf, samples.latents.labels, samples.multipliers_leaf, keeps, on_ready
                )
                share.G.add(G)
                if self.moments:
                    self.moments.add(share.member, samples.x_leaf)
                if self.coupled:  # the statistics' sums must not meet buckets on their way
                    self.mesh.world.with_rank_check(self.comm_stream.wait)
                if keeps:
                    kept[share.member] = samples, margins, G
        moments = self._moments_of_all()

        for share, S in zip(self.shares, scales, strict=True):
            k, objective, alpha = share.member, share.objective, self.alpha[share.member]
            phases.enter("all_reduce")
            residual = objective.residual(share.G.total(), alpha, own)
            phases.enter("cotangents")
            backend = backends.pop(k)
            losses_of = functools.partial(self._sample_losses, share, backend, None if moments is None else moments[k])
            backend.set_direction(residual.direction, lambda *micro_batch, of=losses_of: _total(of(*micro_batch)))
            # the kept one first
            for micro_batch in reversed(share.micro_batches) if self.keeps_last else share.micro_batches:
                if k in kept:
                    samples, margins, products = kept.pop(k)
                    seeds = residual.direction
                else:  # <v, G> alone is cheaper than G
                    samples = self._draw(share, step, micro_batch, S, keep_graph=True)
                    margins, product = backend.directional_sum(
                        samples.x_leaf, samples.latents.labels, samples.multipliers_leaf
                    )
                    products, seeds = {"<v, G>": product}, {"<v, G>": torch.ones_like(product)}
                losses = losses_of(margins, samples.multipliers_leaf, samples.x_leaf, samples.latents.labels)
                gx, gmu = cotangents(products, seeds, [samples.x_leaf, samples.multipliers_leaf], _total(losses))
                # the loss of several members is the mean of theirs
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
        self.engine.step(lr_scale * lr_factor(step, config.steps))
        self._follow(figures)
        phases.stop()
        return StepResult({**scalars, **self._wire()}, sample_stats.gather() if sample_stats else [])

    def _draw(self, share: MemberShard, step: int, micro_batch: SampleRange, S: float, keep_graph: bool) -> Samples:
        """Return the samples of one micro-batch and their multipliers."""
        objective = share.objective
        if self.engine.gathers_in_forward:  # two collectives at once could meet in another order on another rank
            self.mesh.world.with_rank_check(self.comm_stream.wait)
        latents = share.sampler.batch(step, *micro_batch).to(self.mesh.world.device)
        with torch.set_grad_enabled(keep_graph):
            x, h = self.engine.module(latents)
            x, h = x.to(objective.lower), h[:, : objective.classes].to(objective.lower)
            mu = duality.multipliers_from(h, latents.labels, S, objective.batch)
        return Samples(latents, x, mu, x.detach().requires_grad_(), mu.detach().requires_grad_())

    def _kkt_backend(self, share: MemberShard, step: int, S: float, gamma: float) -> KKTBackend:
        """Return the backend of a member's KKT sums of this step; collective if batch statistics couple its samples."""

        def micro_batches() -> Iterator[MicroBatch]:
            for micro_batch in share.micro_batches:
                samples = self._draw(share, step, micro_batch, S, keep_graph=False)
                yield samples.x, samples.latents.labels, samples.multipliers

        return share.objective.kkt_backend(gamma, None if self.one_pass else micro_batches, adjoint_sum(self.mesh))

    def _sample_losses(
        self,
        share: MemberShard,
        backend: KKTBackend,
        input_moments: Tensor | None,
        margins: Tensor,
        multipliers: Tensor,
        x: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """Return the weighted losses of a micro-batch that ``backend`` has just evaluated."""
        alpha = self.alpha[share.member]
        return share.objective.sample_losses(margins, multipliers, x, labels, alpha, backend.moments, input_moments)

    def _input_moments(self) -> InputMoments:
        world, shape = self.mesh.world, next(share.objective for share in self.shares).lower.shape
        summation = TreeSum(world, len(self.batches)) if self.config.deterministic else RunningSum(world)
        return InputMoments(self.batches, shape, summation, world.device)

    def _moments_of_all(self) -> Tensor | None:
        """Return E x and E x^2 of every classifier's samples ``[K, 2, *S]``, None if no prior needs them; collective."""
        if self.moments is None:
            return None
        self.mesh.world.with_rank_check(
            self.comm_stream.wait
        )  # two collectives at once could meet in another order on another rank
        return self.moments.total()

    def _collector(self) -> SampleStatsCollector:
        shape = next(share.objective for share in self.shares).lower.shape
        return SampleStatsCollector(self.batches, self.classes, shape, self.mesh.world)

    def _follow(self, figures: list[dict[str, float]]) -> None:
        """Update every alpha by its rho, on every rank."""
        self.alpha = [
            alpha_control.feedback(alpha, start, rho(own, alpha), self.config.alpha.max_change)
            for alpha, start, own in zip(self.alpha, self.alpha0, figures, strict=True)
        ]

    def _wire(self) -> dict[str, float]:
        """Return bytes and seconds of this rank's residual all-reduce, and the share of its time that overlaps with computation."""
        busy, exposed = self.comm_stream.seconds()
        sent = sum(share.G.take_bytes() for share in self.shares)
        return {"wire/bytes": float(sent), "wire/seconds": busy, "wire/hidden": 1 - exposed / busy if busy else 0.0}


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()
