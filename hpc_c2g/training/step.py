"""One training step, as the method reads: sample, KKT sum, reduce, cotangents, step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from hpc_c2g.distributed.reduction import RunningSum, Summation, TreeSum
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import C2GError
from hpc_c2g.generators.latents import Latents, LatentSampler
from hpc_c2g.kkt import duality, scale
from hpc_c2g.kkt.margins import other_classes, smallest_margins
from hpc_c2g.kkt.stationarity import cotangents
from hpc_c2g.training.config import TrainConfig
from hpc_c2g.training.objective import Objective
from hpc_c2g.training.schedules import gate_width, rate_factor


class Engine(Protocol):
    """What a step needs of the engine that owns the generator."""

    module: nn.Module

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of ``surrogate``, a plain sum over samples, to the generator's."""

    def reduce(self) -> None:
        """Finish the sum over all micro-batches and ranks."""

    def gradient_norm(self) -> Tensor:
        """L2 norm of the reduced gradient, the same on every rank; collective."""

    def step(self, rate_factor: float) -> None:
        """Update the generator with the summed gradient and clear it."""


def micro_batches(config: TrainConfig, world: World) -> list[tuple[int, int]]:
    """This rank's micro-batches as ranges of global sample indices; in deterministic mode the virtual shards.

    Raises:
        C2GError: the batch or the shards cannot be shared evenly by the ranks.
    """
    if config.deterministic:
        first, last = world.share(config.virtual_shards, "virtual_shards")
        edges = [config.global_batch * shard // config.virtual_shards for shard in range(first, last + 1)]
        return list(itertools.pairwise(edges))
    start, stop = world.share(config.global_batch, "global_batch")
    size = config.micro_batch or stop - start
    return [(i, min(i + size, stop)) for i in range(start, stop, size)]


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


@dataclass
class StepResult:
    """What a step measured (Python numbers), and the tensors that quantiles are read from.

    Attributes:
        scalars: losses, alpha, rho, gradient norms.
        margins: scaled runner-up margins e^a min_j m_ij of the last micro-batch.
        multipliers: mu_ij B / S of the last micro-batch, j != y_i.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    margins: Tensor | None = None
    multipliers: Tensor | None = None


class TrainStep:
    """Carries alpha from step to step; everything else is a function of (step, weights)."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        sampler: LatentSampler,
        engine: Engine,
        world: World,
        alpha0: float,
    ) -> None:
        self.config, self.objective, self.sampler, self.engine = config, objective, sampler, engine
        self.world, self.device = world, world.device
        self.alpha = self.alpha0 = alpha0
        self.slices = micro_batches(config, world)
        self.summation: Summation = TreeSum(world) if config.deterministic else RunningSum(world)

    def state_dict(self) -> dict[str, float]:
        """alpha and where it started."""
        return {"alpha": self.alpha, "alpha0": self.alpha0}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what ``state_dict`` returned."""
        self.alpha, self.alpha0 = state["alpha"], state["alpha0"]

    def __call__(self, step: int) -> StepResult:
        """Train on the global batch of ``step`` (counted from 1)."""
        config, objective, alpha = self.config, self.objective, self.alpha
        gamma = gate_width(config.gates, step, config.steps)
        S = objective.multiplier_scale(alpha)
        one_pass = len(self.slices) == 1

        for piece in self.slices:
            micro = self._micro_batch(step, piece, gamma, S, keep_graph=one_pass)
            self.summation.add([*micro.G.values(), *duality.weighted_margin_sums(micro.margins, micro.multipliers)])
        *parts, mu_m, mu = self.summation.total()
        G = dict(zip(objective.theta, parts, strict=True))

        residual = objective.residual(G, alpha)
        reference = self._reference(step, micro.x if one_pass and self.world.size == 1 else None)
        for piece in self.slices:
            if not one_pass:
                micro = self._micro_batch(step, piece, gamma, S, keep_graph=True)
            losses = objective.sample_losses(
                micro.margins, micro.multipliers_leaf, micro.x_leaf, micro.latents.labels, alpha, reference
            )
            gx, gmu = cotangents(
                micro.G,
                residual.direction,
                [micro.x_leaf, micro.multipliers_leaf],
                torch.stack(list(losses.values())).sum(),
            )
            self.engine.backward((micro.x * gx).sum() + (micro.multipliers * gmu).sum())
            self.summation.add([*losses.values(), gx.square().sum(), gmu.square().sum()])
        self.engine.reduce()
        *values, gx2, gmu2 = self.summation.total()
        terms = dict(zip(losses, values, strict=True))

        result = self._result(step, residual.terms, terms, torch.stack([mu_m, mu, gx2, gmu2]), micro, S)
        self.engine.step(rate_factor(config.optimiser, step, config.steps))
        settings = config.scale
        self.alpha = scale.feedback(
            alpha, self.alpha0, result.scalars["rho"], settings.rate, settings.target, settings.gain
        )
        return result

    def _micro_batch(self, step: int, piece: tuple[int, int], gamma: float, S: float, keep_graph: bool) -> MicroBatch:
        latents = self._latents(step, *piece)
        with torch.set_grad_enabled(keep_graph):
            x, h = self.engine.module(latents)
            x, h = x.to(self.objective.lower), h.to(self.objective.lower)
            mu = duality.multipliers_from(h, latents.labels, S, self.config.global_batch)
        x_leaf, mu_leaf = x.detach().requires_grad_(), mu.detach().requires_grad_()
        margins, G = self.objective.kkt_sum(gamma, x_leaf, latents.labels, mu_leaf, keep_graph)
        return MicroBatch(latents, x, mu, x_leaf, mu_leaf, margins, G)

    def _latents(self, step: int, start: int, stop: int) -> Latents:
        drawn = self.sampler.batch(step, start, stop)
        return Latents(drawn.z.to(self.device), drawn.labels.to(self.device), drawn.index.to(self.device))

    def _reference(self, step: int, x: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The samples that repel: the first of the global batch, drawn again where they are not at hand."""
        if not self.config.prior.repulsion:
            return None
        count = min(self.config.prior.repulsion_references, self.config.global_batch)
        latents = self._latents(step, 0, count)
        if x is None:
            with torch.no_grad():
                x = self.engine.module(latents)[0].to(self.objective.lower)
        return x.detach()[:count], latents.labels

    def _result(
        self,
        step: int,
        stationarity: dict[str, Tensor],
        terms: dict[str, Tensor],
        sums: Tensor,
        micro: MicroBatch,
        S: float,
    ) -> StepResult:
        """Bring the numbers to the host, and stop before the update where one of them is not finite."""
        names = (
            [f"stationarity/{k}" for k in stationarity]
            + list(terms)
            + ["gradient/generator", "mu_m", "mu", "gx", "gmu"]
        )
        values = torch.stack([*stationarity.values(), *terms.values(), self.engine.gradient_norm().to(sums)]).to(sums)
        numbers = dict(zip(names, torch.cat([values, sums]).tolist(), strict=True))
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise C2GError(
                    f"step {step}: the term {name!r} is {value}; the generator was not updated",
                    "train in another run_dir with a lower optimiser.rate, or look at the classifier's weights",
                )
        gradient_x, gradient_mu = math.sqrt(numbers.pop("gx")), math.sqrt(numbers.pop("gmu"))
        total_mu, mu_m = numbers.pop("mu"), numbers.pop("mu_m")
        residual = sum(v for k, v in numbers.items() if k.startswith("stationarity/"))
        dual = numbers["feasibility"] + numbers.get("slackness", 0.0)
        weight = self.config.stationarity.weight
        scaled_margins = math.exp(self.alpha) * micro.margins.detach()
        labels = micro.latents.labels
        others = other_classes(labels, scaled_margins.shape[1])
        return StepResult(
            {
                "loss": weight * residual + sum(numbers[name] for name in terms),
                "stationarity": residual,
                "duality": dual,
                "alpha": self.alpha,
                "rho": math.exp(self.alpha) * mu_m / max(total_mu, 1e-300),
                "multiplier_sum": total_mu / S,
                "gradient/x": gradient_x,
                "gradient/multipliers": gradient_mu,
                **numbers,
            },
            smallest_margins(scaled_margins, labels),
            micro.multipliers.detach()[others] * self.config.global_batch / S,
        )
