"""Puts the parts of a run together: bundles, mesh, sharding, generator, engine and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_c2g.classifiers.bundle import Bundle, load_bundle
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import RunningSum, TreeSum
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import C2GError
from hpc_c2g.generators.latents import LatentSampler
from hpc_c2g.generators.networks import FreeImages, Generator, build_generator
from hpc_c2g.generators.trained import TrainedGenerator
from hpc_c2g.monitoring.images import drawable
from hpc_c2g.training.account import Account
from hpc_c2g.training.adam_engine import AdamEngine
from hpc_c2g.training.config import TrainConfig
from hpc_c2g.training.engine import DeepSpeedEngine
from hpc_c2g.training.objective import Objective, loss_terms
from hpc_c2g.training.sharding import Sharding, shard
from hpc_c2g.training.step import TrainStep


@dataclass(frozen=True)
class Parts:
    """What a running run consists of on one rank."""

    engine: DeepSpeedEngine | AdamEngine
    step: TrainStep
    gallery: TrainedGenerator

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; collective."""
        return {
            "engine": self.engine.state_dict(),
            "scale": self.step.state_dict(),
            "trained": self.gallery.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; collective."""
        self.engine.load_state_dict(state["engine"])
        self.step.load_state_dict(state["scale"])

    def trained(self) -> TrainedGenerator | None:
        """The generator as it is now, on rank 0, if it makes images; collective."""
        if not drawable(self.gallery.input_shape):
            return None
        weights = self.engine.weights()
        if self.step.mesh.world.is_first:
            self.gallery.module.load_state_dict(weights)
        return self.gallery


@dataclass(frozen=True)
class Assembly:
    """What is settled before anything is computed.

    Attributes:
        config: of the run.
        world: all ranks.
        bundles: the classifiers.
        mesh: who works on which.
        sharding: this rank's samples.
    """

    config: TrainConfig
    world: World
    bundles: list[Bundle]
    mesh: Mesh
    sharding: Sharding

    @classmethod
    def of(cls, config: TrainConfig, world: World) -> Assembly:
        """Load and lay out; collective.

        Raises:
            C2GError: classifiers that cannot share a generator, or ranks and samples that cannot be shared out.
        """
        bundles = [load_bundle(folder) for folder in config.classifiers]
        shapes = {folder: list(b.input_shape) for folder, b in zip(config.classifiers, bundles, strict=True)}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            told = ", ".join(f"{folder} {shape}" for folder, shape in shapes.items())
            raise C2GError(
                f"the classifiers take inputs of different shapes: {told}",
                "one generator makes one shape; train the others in runs of their own",
            )
        settings = config.distributed
        groups = 1 if config.deterministic and settings.groups is None else settings.groups
        mesh = Mesh.over(world, len(bundles), groups, settings.hierarchical)
        sharding = shard(config, class_counts(bundles), mesh, config.micro_batch)  # type: ignore[arg-type]
        return cls(config, world, bundles, mesh, sharding)

    def generator(self) -> Generator | FreeImages:
        """The untrained network."""
        lower, upper = boxes(self.bundles)
        config, classes = self.config, class_counts(self.bundles)
        return build_generator(
            config.generator, config.latents.dimensions, classes, self.sharding.batches, lower, upper, config.seed
        )

    def parts(self, alphas: list[float]) -> Parts:
        """Everything that trains, each classifier's alpha at its start."""
        config, world, mesh = self.config, self.world, self.mesh
        classes, batches = class_counts(self.bundles), self.sharding.batches
        engine: DeepSpeedEngine | AdamEngine
        if config.deterministic:
            gradients = TreeSum(world, len(self.bundles))
            engine = AdamEngine(self.generator().to(world.device), config.optimiser, gradients)
        else:
            engine = DeepSpeedEngine(self.generator(), config, self.sharding.micro_batches, world)
        samplers = {
            k: LatentSampler(config.latents, classes[k], batches[k], config.steps, config.seed, k) for k in mesh.mine
        }
        objectives = {k: Objective(self.bundles[k], config, batches[k], world.device, torch.float32) for k in mesh.mine}
        account = Account(
            [list(b.parameters) for b in self.bundles],
            [loss_terms(config, len(b.input_shape) == 3) for b in self.bundles],
            TreeSum(world, len(self.bundles)) if config.deterministic else RunningSum(world),
            world.device,
        )
        step = TrainStep(config, objectives, samplers, classes, account, engine, mesh, self.sharding, alphas)
        gallery = TrainedGenerator.of(self.bundles, self.generator().to(world.device), config.latents.dimensions)
        return Parts(engine, step, gallery)


def class_counts(bundles: Sequence[Bundle]) -> list[int]:
    """C_k."""
    return [len(bundle.classes) for bundle in bundles]


def boxes(bundles: Sequence[Bundle]) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of each classifier's normalised inputs, ``[K, *S]`` each."""
    bounds = [bundle.normalisation.box() for bundle in bundles]
    return torch.stack([b[0].float() for b in bounds]), torch.stack([b[1].float() for b in bounds])
