"""A short reconstruction of free images that finds alpha before the generator starts.

alpha's feedback needs samples that satisfy the conditions, and a generator that meets a wrong alpha first settles in a
worse optimum. A few hundred cheap steps on free images bring alpha close, from the classifier alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hpc_c2g.distributed.environment import LaunchEnvironment
from hpc_c2g.distributed.reduction import RunningSum
from hpc_c2g.distributed.world import World
from hpc_c2g.generators.latents import LatentConfig, LatentSampler
from hpc_c2g.generators.networks import FreeImages, FreeImagesConfig
from hpc_c2g.training.adam_engine import AdamEngine
from hpc_c2g.training.config import OptimiserConfig, PriorConfig, TrainConfig
from hpc_c2g.training.objective import Objective
from hpc_c2g.training.step import TrainStep

IMAGES_PER_CLASS = 20
RATE = 0.01


def pilot_alpha(objective: Objective, config: TrainConfig, world: World) -> float:
    """Where alpha starts: ``scale.start`` if given, else after ``scale.pilot_steps`` steps on free images (0: from probes alone)."""
    if config.scale.start is not None:
        return config.scale.start
    steps = config.scale.pilot_steps
    if not steps:
        return objective.initial_alpha()
    count = IMAGES_PER_CLASS * objective.classes
    pilot = replace(
        config,
        steps=steps,
        global_batch=count,
        micro_batch=None,
        generator=FreeImagesConfig(),
        latents=LatentConfig(dimensions=1),
        stationarity=replace(config.stationarity, weight=1.0),
        prior=replace(config.prior, repulsion=PriorConfig.repulsion),
        optimiser=OptimiserConfig(rate=RATE, multiplier_rate=RATE),
        deterministic=False,
    )
    alone = replace(world, launch=LaunchEnvironment())  # one rank runs it for all
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        images = FreeImages(FreeImagesConfig(), count, objective.classes, objective.lower, objective.upper).to(
            world.device
        )
    sampler = LatentSampler(pilot.latents, objective.classes, count, steps, config.seed)
    train_step = TrainStep(
        pilot,
        objective.for_config(pilot),
        sampler,
        AdamEngine(images, pilot.optimiser, RunningSum(alone)),
        alone,
        objective.initial_alpha(),
    )
    for step in range(1, steps + 1):
        train_step(step)
    return train_step.alpha
