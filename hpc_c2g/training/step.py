"""One training step, as the method reads: sample, KKT sum, reduce, cotangents, step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpc_c2g.distributed.lane import Lane
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import Arrival, ResidualSum, TreeSum
from hpc_c2g.generators.latents import Latents, LatentSampler
from hpc_c2g.kkt import duality, scale
from hpc_c2g.kkt.stationarity import cotangents
from hpc_c2g.training.account import BALANCE, Account, rho
from hpc_c2g.training.bands import BandCollector, Bands
from hpc_c2g.training.config import TrainConfig
from hpc_c2g.training.objective import Objective, Residual
from hpc_c2g.training.schedules import gate_width, rate_factor
from hpc_c2g.training.sharding import Range, Sharding


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

    def step(self, rate_factor: float) -> None:
        """Update the generator with the summed gradient and clear it."""


@dataclass(frozen=True)
class Share:
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
    pieces: list[Range]
    G: ResidualSum | TreeSum


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one micro-batch, with what the KKT sum knows of them. Leaves carry the cotangents to the generator."""

    latents: Latents
    x: Tensor
    multipliers: Tensor
    x_leaf: Tensor
    multipliers_leaf: Tensor
    margins: Tensor
    G: dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step measured, on every rank: its scalars, and where they were asked for the bands of each classifier."""

    scalars: dict[str, float]
    bands: list[Bands]


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
    """

    def __init__(
        self,
        config: TrainConfig,
        objectives: Mapping[int, Objective],
        samplers: Mapping[int, LatentSampler],
        classes: Sequence[int],
        account: Account,
        engine: Engine,
        mesh: Mesh,
        sharding: Sharding,
        alpha0: list[float],
    ) -> None:
        self.config, self.account, self.engine, self.mesh = config, account, engine, mesh
        self.alpha, self.alpha0 = list(alpha0), list(alpha0)
        self.one_pass, self.batches, self.classes = sharding.one_pass, sharding.batches, list(classes)
        self.lane = Lane(mesh.world.device)
        settings = config.distributed
        bucket_bytes = int(settings.bucket_mib * 2**20)
        self.shares = [
            Share(
                k,
                objectives[k],
                samplers[k],
                sharding.pieces[k],
                TreeSum(mesh.world)
                if config.deterministic
                else ResidualSum(objectives[k].theta, mesh, self.lane, settings.wire, bucket_bytes),
            )
            for k in mesh.mine
        ]

    def state_dict(self) -> dict[str, Any]:
        """Every alpha and where it started."""
        return {"alpha": list(self.alpha), "alpha0": list(self.alpha0)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.alpha, self.alpha0 = list(state["alpha"]), list(state["alpha0"])

    def __call__(self, step: int, watch: bool = False) -> StepResult:
        """Train on the global batch of ``step`` (counted from 1); ``watch`` collects bands too.

        Raises:
            C2GError: a term is not finite; on every rank, before the update.
        """
        config = self.config
        gamma = gate_width(config.gates, step, config.steps)
        scales = [share.objective.multiplier_scale(self.alpha[share.classifier]) for share in self.shares]
        bands = BandCollector(self.batches, self.classes, self.mesh.world) if watch else None
        kept: dict[int, MicroBatch] = {}

        for share, S in zip(self.shares, scales, strict=True):
            for piece in share.pieces:
                if self.engine.gathers_in_forward:  # two collectives at once could meet in another order on another rank
                    self.mesh.world.guarded(self.lane.wait)
                on_ready = share.G.micro_batch(last=piece == share.pieces[-1])
                micro = _micro_batch(share, self.engine.module, step, piece, gamma, S, self.one_pass, on_ready)
                share.G.add(micro.G)
                if self.one_pass:
                    kept[share.classifier] = micro

        for share, S in zip(self.shares, scales, strict=True):
            k, objective, alpha = share.classifier, share.objective, self.alpha[share.classifier]
            residual = objective.residual(share.G.total(), alpha)
            reference = self._reference(share, step)
            for piece in share.pieces:
                micro = (
                    kept.pop(k) if k in kept else _micro_batch(share, self.engine.module, step, piece, gamma, S, True)
                )
                losses = objective.sample_losses(
                    micro.margins, micro.multipliers_leaf, micro.x_leaf, micro.latents.labels, alpha, reference
                )
                gx, gmu = cotangents(
                    micro.G,
                    residual.direction,
                    [micro.x_leaf, micro.multipliers_leaf],
                    torch.stack(list(losses.values())).sum(),
                )
                # the loss of several classifiers is the mean of theirs
                self.engine.backward(((micro.x * gx).sum() + (micro.multipliers * gmu).sum()) / self.mesh.classifiers)
                self._count(share, piece, residual, losses, micro, S, gx, gmu)
                if bands is not None:
                    bands.note(k, piece[0], micro.margins, micro.multipliers, alpha, objective.batch / S)
        self.engine.reduce()

        figures, norm = self.account.close(step, self.engine.gradient_norm())
        scalars = self.account.tell(figures, self.alpha, norm, config.stationarity.weight)
        self.engine.step(rate_factor(config.optimiser, step, config.steps))
        self._follow(figures)
        return StepResult({**scalars, **self._wire()}, bands.close() if bands else [])

    def _reference(self, share: Share, step: int) -> tuple[Tensor, Tensor] | None:
        """The samples that repel: the first of the classifier's batch, drawn again because they may be another rank's."""
        if not self.config.prior.repulsion:
            return None
        count = min(self.config.prior.repulsion_references, share.objective.batch)
        latents = share.sampler.batch(step, 0, count).to(self.mesh.world.device)
        with torch.no_grad():
            x = self.engine.module(latents)[0].to(share.objective.lower)
        return x, latents.labels

    def _count(
        self,
        share: Share,
        piece: Range,
        residual: Residual,
        losses: Mapping[str, Tensor],
        micro: MicroBatch,
        S: float,
        gx: Tensor,
        gmu: Tensor,
    ) -> None:
        """Hand the micro-batch's scalars to the account."""
        once = residual.terms if piece[0] == 0 else {}  # L_stat is known to every rank, and counts once
        mu_m, mu = duality.weighted_margin_sums(micro.margins, micro.multipliers)
        values = {
            **{f"stationarity/{name}": term for name, term in once.items()},
            **losses,
            **dict(zip(BALANCE, (mu_m / S, mu / S, gx.square().sum(), gmu.square().sum()), strict=True)),
        }
        self.account.add(share.classifier, values)

    def _follow(self, figures: list[dict[str, float]]) -> None:
        """Every alpha follows its rho, on every rank."""
        settings = self.config.scale
        self.alpha = [
            scale.feedback(alpha, start, rho(own, alpha), settings.rate, settings.target, settings.gain)
            for alpha, start, own in zip(self.alpha, self.alpha0, figures, strict=True)
        ]

    def _wire(self) -> dict[str, float]:
        """What the residual all-reduce of this rank sent and took, and the share of its time that hid behind the computation."""
        busy, exposed = self.lane.seconds()
        sent = sum(share.G.take_bytes() for share in self.shares)
        return {"wire/bytes": float(sent), "wire/seconds": busy, "wire/hidden": 1 - exposed / busy if busy else 0.0}


def _micro_batch(
    share: Share,
    module: nn.Module,
    step: int,
    piece: Range,
    gamma: float,
    S: float,
    keep_graph: bool,
    on_ready: Arrival | None = None,
) -> MicroBatch:
    objective = share.objective
    latents = share.sampler.batch(step, *piece).to(objective.lower.device)
    with torch.set_grad_enabled(keep_graph):
        x, h = module(latents)
        x, h = x.to(objective.lower), h[:, : objective.classes].to(objective.lower)
        mu = duality.multipliers_from(h, latents.labels, S, objective.batch)
    x_leaf, mu_leaf = x.detach().requires_grad_(), mu.detach().requires_grad_()
    margins, G = objective.kkt_sum(gamma, x_leaf, latents.labels, mu_leaf, keep_graph, on_ready)
    return MicroBatch(latents, x, mu, x_leaf, mu_leaf, margins, G)
