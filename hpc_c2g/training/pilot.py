"""Pilot: a short reconstruction of free images that finds alpha before the generator starts.

alpha's feedback needs samples that satisfy the conditions, and a generator that meets a wrong alpha first settles in a
worse optimum. A few hundred cheap steps on free images bring alpha close, from the classifier alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import RunningSum
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.generators.config import FreeImagesConfig
from hpc_c2g.generators.networks import FreeImages
from hpc_c2g.training.config.train import OptimizerConfig, TrainConfig
from hpc_c2g.training.engines.adam_engine import AdamEngine
from hpc_c2g.training.step.train_step import TrainStep

IMAGES_PER_CLASS = 20
LR = 0.01


def pilot_alphas(
    bundles: Sequence[Bundle], config: TrainConfig, world: World, boundary: Callable[[], None]
) -> list[float]:
    """Return each classifier's initial alpha: ``alpha.init``, or the result of a pilot, which one rank runs for all; collective.

    Args:
        bundles: Bundles of all classifiers.
        config: Settings of the run.
        world: All ranks.
        boundary: Function that every rank calls equally often, between steps; may raise on all of them.

    Raises:
        UserError: A classifier has no rates or no margin, or its pilot diverged to non-finite numbers; on every rank.
    """
    if config.alpha.init is not None:
        return [config.alpha.init] * len(bundles)
    alphas = torch.zeros(len(bundles), dtype=torch.float64, device=world.device)
    rounds = -(-len(bundles) // world.size)
    for number in range(rounds):
        k = number * world.size + world.rank
        bundle = bundles[k] if k < len(bundles) else None
        pilot = world.raise_on_all_ranks(lambda bundle=bundle: bundle and _pilot(bundle, config, world.device))  # type: ignore[misc]
        fault: UserError | None = None
        for step in range(1, config.alpha.pilot_steps + 1):
            boundary()
            if pilot is not None and fault is None:
                try:
                    pilot(step)
                except UserError as error:  # raised below, on all ranks
                    fault = error
        world.raise_on_all_ranks(lambda fault=fault: _raise(fault))  # type: ignore[misc]
        if pilot is not None:
            alphas[k] = pilot.alpha[0]
    world.sum([alphas])
    return [float(alpha) for alpha in alphas]


def _raise(fault: UserError | None) -> None:
    if fault is not None:
        raise fault


def _pilot(bundle: Bundle, config: TrainConfig, device: torch.device) -> TrainStep:
    """Return the training step of free images under the run's own objective, in one process."""
    classes = len(bundle.classes)
    count = IMAGES_PER_CLASS * classes
    pilot = replace(
        config,
        classifier="pilot",
        solutions=1,
        steps=max(1, config.alpha.pilot_steps),
        global_batch=count,
        shares=[],
        micro_batch=None,
        generator=FreeImagesConfig(),
        stationarity=replace(config.stationarity, weight=1.0),
        optimizer=OptimizerConfig(lr=LR, lr_multipliers=LR),
        deterministic=False,
    )
    alone = World.single_process(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        images = FreeImages(FreeImagesConfig(), [count], [classes], bundle.input_shape).to(device)
    engine = AdamEngine(images, pilot.optimizer, RunningSum(alone))
    return TrainStep.build(pilot, [bundle], engine, Mesh.over(alone, 1))
