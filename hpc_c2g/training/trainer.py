"""Assembly of a run: bundles, mesh, sharding, generator, engine and step."""

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
        """Return the state for a checkpoint; collective."""
        return {
            "engine": self.engine.state_dict(),
            "scale": self.step.state_dict(),
            "trained": self.preview_generator.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of ``state_dict``; collective."""
        self.engine.load_state_dict(state["engine"])
        self.step.load_state_dict(state["scale"])

    def trained(self) -> TrainedGenerator | None:
        """Return the present generator, on rank 0, if it makes images; collective."""
        if not drawable(self.preview_generator.input_shape):
            return None
        weights = self.engine.weights()
        if self.step.mesh.world.is_rank0:
            self.preview_generator.module.load_state_dict(weights)
        return self.preview_generator


@dataclass(frozen=True)
class TrainerSetup:
    """Layout of a run, determined before anything is computed.

    Attributes:
        config: Settings of the run.
        world: All ranks.
        bundles: Bundles of the members, in the order of ``config.members``.
        mesh: Assignment of members to ranks.
        micro_batch: Samples whose graph is held at once, None for no limit.
        sharding: Samples of this rank.
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
        """Determine the layout of a run; collective.

        Args:
            config: Settings of the run.
            bundles: Bundles of the members.
            mesh: Assignment of members to ranks.
            found_before: Result of ``micro_batch=auto`` when the run began on as many ranks: it resumes with the same bits.

        Raises:
            UserError: Ranks, classifiers or samples cannot be divided, or do not fit.
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
        """Return advice to log before the first step: parts of the batch in which some codes occur more often than others."""
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
                    f"global_batch: {batch if alone else part} is no multiple of classes x codes = {period}: some codes occur more often"
                    f" than others, which adds noise to the KKT sum; {fitting if alone else f'a part of {fitting}'} would not"
                )
        return found

    def generator(self) -> Generator | FreeImages:
        """Return the untrained network."""
        lower, upper = boxes(self.bundles)
        config, classes = self.config, class_counts(self.bundles)
        return build_generator(
            config.generator, LATENT_DIMENSIONS, classes, self.sharding.batches, lower, upper, config.seed
        )

    def build(self, alphas: list[float]) -> Trainer:
        """Return everything that trains, with each member's alpha at its start."""
        config, world = self.config, self.world
        engine: DeepSpeedEngine | AdamEngine
        if config.deterministic:
            gradients = TreeSum(world, len(self.bundles))
            engine = AdamEngine(self.generator().to(world.device), config.optimizer, gradients)
        else:
            engine = DeepSpeedEngine(self.generator(), config, self.sharding.micro_batch_count, world)
        step = TrainStep.build(config, self.bundles, engine, self.mesh, alphas, micro_batch=self.micro_batch)
        # on the CPU: a second generator may not fit on the device
        preview_generator = TrainedGenerator.of(self.bundles, config.solutions, self.generator(), LATENT_DIMENSIONS)
        return Trainer(engine, step, preview_generator)


def build_mesh(config: TrainConfig, world: World) -> Mesh:
    """Return the mesh of a run; collective.

    Raises:
        UserError: Classifiers and processes cannot be divided into the groups.
    """
    settings = config.distributed
    groups = 1 if config.deterministic and settings.groups is None else settings.groups
    return Mesh.over(world, len(config.members), groups, settings.hierarchical)
