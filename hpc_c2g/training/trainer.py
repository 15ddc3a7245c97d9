"""Puts the parts of a run together: bundles, mesh, sharding, generator, engine and step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import TreeSum
from hpc_c2g.distributed.world import World
from hpc_c2g.generators.config import LATENT_DIMENSIONS
from hpc_c2g.generators.networks import FreeImages, Generator, build_generator
from hpc_c2g.generators.trained import TrainedGenerator
from hpc_c2g.kkt.normalization import couples
from hpc_c2g.monitoring.images import drawable
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.cost.capacity import available_bytes, check_classifiers, largest_that_fits
from hpc_c2g.training.engines.adam_engine import AdamEngine
from hpc_c2g.training.engines.deepspeed_engine import DeepSpeedEngine
from hpc_c2g.training.step.bundles import boxes, class_counts
from hpc_c2g.training.step.objective import check_uncoupled
from hpc_c2g.training.step.sharding import Sharding, check_coupled, shard
from hpc_c2g.training.step.train_step import TrainStep


@dataclass(frozen=True)
class Trainer:
    """Engine, step and preview of a run on one rank."""

    engine: DeepSpeedEngine | AdamEngine
    step: TrainStep
    preview_generator: TrainedGenerator

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; collective."""
        return {
            "engine": self.engine.state_dict(),
            "scale": self.step.state_dict(),
            "trained": self.preview_generator.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; collective."""
        self.engine.load_state_dict(state["engine"])
        self.step.load_state_dict(state["scale"])

    def trained(self) -> TrainedGenerator | None:
        """The generator as it is now, on rank 0, if it makes images; collective."""
        if not drawable(self.preview_generator.input_shape):
            return None
        weights = self.engine.weights()
        if self.step.mesh.world.is_rank0:
            self.preview_generator.module.load_state_dict(weights)
        return self.preview_generator


@dataclass(frozen=True)
class TrainerSetup:
    """Layout of a run, settled before anything is computed.

    Attributes:
        config: of the run.
        world: all ranks.
        bundles: of the members, in the order of ``config.members``.
        mesh: who works on which.
        micro_batch: samples whose graph is held at once, None for no limit.
        sharding: this rank's samples.
    """

    config: TrainConfig
    world: World
    bundles: list[Bundle]
    mesh: Mesh
    micro_batch: int | None
    sharding: Sharding

    @classmethod
    def create(
        cls, config: TrainConfig, bundles: list[Bundle], mesh: Mesh, found_before: int | None = None
    ) -> TrainerSetup:
        """Lay out; collective.

        Args:
            config: of the run.
            bundles: of its members.
            mesh: the ranks.
            found_before: what ``micro_batch=auto`` came to when the run began on as many ranks: it goes on bitwise.

        Raises:
            UserError: ranks, classifiers or samples that cannot be shared out, or do not fit.
        """
        world = mesh.world
        free = available_bytes(world)
        world.raise_on_all_ranks(lambda: check_classifiers(bundles, mesh, free))
        size = config.micro_batch
        if isinstance(size, str):
            size = found_before or largest_that_fits(bundles, config, mesh, free)
        sharding = shard(config, class_counts(bundles), mesh, size)
        if any(couples(b.model, config.stationarity.statistics) for b in bundles):
            check_coupled(config, sharding)
        else:
            check_uncoupled(config)
        return cls(config, world, bundles, mesh, size, sharding)

    def advice(self) -> list[str]:
        """Advice to log before the first step: parts of the batch that meet some codes more often than others."""
        config, found = self.config, []
        if not config.generator.codes or config.generator.name == "free":
            return []
        alone = len(self.bundles) == 1
        for k in range(0, len(self.bundles), config.solutions):  # a classifier's solutions have equal parts
            batch, period = self.sharding.batches[k], len(self.bundles[k].classes) * config.generator.codes
            if batch % period:
                part, fitting = (
                    f"{config.prefixes[k].rstrip('/')}'s part of it, {batch},",
                    (batch // period + 1) * period,
                )
                found.append(
                    f"global_batch: {batch if alone else part} is no multiple of classes x codes = {period}: some codes are met more often"
                    f" than others, which adds noise to the KKT sum; {fitting if alone else f'a part of {fitting}'} would not"
                )
        return found

    def generator(self) -> Generator | FreeImages:
        """The untrained network."""
        lower, upper = boxes(self.bundles)
        config, classes = self.config, class_counts(self.bundles)
        return build_generator(
            config.generator, LATENT_DIMENSIONS, classes, self.sharding.batches, lower, upper, config.seed
        )

    def build(self, alphas: list[float]) -> Trainer:
        """Everything that trains, each member's alpha at its start."""
        config, world = self.config, self.world
        engine: DeepSpeedEngine | AdamEngine
        if config.deterministic:
            gradients = TreeSum(world, len(self.bundles))
            engine = AdamEngine(self.generator().to(world.device), config.optimizer, gradients)
        else:
            engine = DeepSpeedEngine(self.generator(), config, self.sharding.micro_batch_count, world)
        step = TrainStep.build(config, self.bundles, engine, self.mesh, alphas, micro_batch=self.micro_batch)
        # on the CPU: the device may hold no second generator
        preview_generator = TrainedGenerator.of(self.bundles, config.solutions, self.generator(), LATENT_DIMENSIONS)
        return Trainer(engine, step, preview_generator)


def build_mesh(config: TrainConfig, world: World) -> Mesh:
    """The mesh that a run asks for; collective.

    Raises:
        UserError: classifiers and processes cannot be shared by the groups.
    """
    settings = config.distributed
    groups = 1 if config.deterministic and settings.groups is None else settings.groups
    return Mesh.over(world, len(config.members), groups, settings.hierarchical)
