"""Subjects of the single-process benchmarks: our training step, and the joint graph over the whole batch that it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional as F

from benchmarks.common import random_classifier
from hpc_c2g.classifiers.bundle import Bundle, load_bundle
from hpc_c2g.distributed.environment import pick_device
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import RunningSum
from hpc_c2g.distributed.world import World
from hpc_c2g.generators.config import LATENT_DIMENSIONS
from hpc_c2g.generators.latents import LatentSampler
from hpc_c2g.generators.networks import build_generator
from hpc_c2g.kkt.margins import pairwise_margins, smallest_margins
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.engines.adam_engine import AdamEngine, build_optimizer
from hpc_c2g.training.step.bundles import boxes, class_counts
from hpc_c2g.training.step.objective import Objective, weights_of
from hpc_c2g.training.step.schedules import GATE_START
from hpc_c2g.training.step.train_step import TrainStep

ALPHA = -1.0
Step = Callable[[int], object]


def classifier(size: int = 28, width: int = 1000, depth: int = 3, classes: int = 10) -> Bundle:
    """MLP with random weights, 784-1000-1000-10 by default."""
    with TemporaryDirectory() as folder:
        return load_bundle(random_classifier(Path(folder) / "classifier", size, width, classes, depth=depth))


def standing(batch: int) -> TrainConfig:
    """A run whose alpha and gates stand still, so that every step costs and gives the same."""
    return TrainConfig(steps=10**6, global_batch=batch, alpha=AlphaConfig(max_change=0.0))


def our_step(bundle: Bundle, config: TrainConfig) -> TrainStep:
    """The training step as ``c2g train`` makes it, with plain Adam: DeepSpeed's own work is not what is compared."""
    device = pick_device(config.device)
    world = World.single_process(device)
    module = build_generator(
        config.generator,
        LATENT_DIMENSIONS,
        class_counts([bundle]),
        [config.global_batch],
        *boxes([bundle]),
        config.seed,
    ).to(device)
    engine = AdamEngine(module, config.optimizer, RunningSum(world))
    micro_batch: int | None = config.micro_batch  # type: ignore[assignment]
    return TrainStep.build(config, [bundle], engine, Mesh.over(world, 1), [ALPHA], micro_batch=micro_batch)


def joint_step(bundle: Bundle, config: TrainConfig) -> Step:
    """The same step with one graph over the whole batch, as the reconstruction peers do it."""
    device = pick_device(config.device)
    batch = config.global_batch
    objective = Objective(bundle, config, batch, device, torch.float32)
    classes = class_counts([bundle])
    module = build_generator(config.generator, LATENT_DIMENSIONS, classes, [batch], *boxes([bundle]), config.seed).to(
        device
    )
    sampler = LatentSampler(LATENT_DIMENSIONS, classes[0], batch, config.seed)
    optimizer = build_optimizer(module, config.optimizer)
    theta = {k: t.clone().requires_grad_() for k, t in objective.theta.items()}
    rates, ea = objective.rates, math.exp(ALPHA)
    left = {k: ea ** rates[k] * t for k, t in objective.theta.items()}
    whole = sum(float(t.square().sum()) for t in left.values())
    S, widths = objective.multiplier_scale(ALPHA), objective.widths(GATE_START)
    half = (objective.upper - objective.lower) / 2
    (feasibility,) = weights_of(next(term for term in objective.terms if term.name == "feasibility"), config)

    def step(number: int) -> float:
        latents = sampler.batch(number, 0, batch).to(device)
        x, h = module(latents)
        margins = pairwise_margins(objective.phi(theta, widths, x), latents.labels)
        others = latents.labels[:, None] != torch.arange(classes[0], device=device)
        mu = S / batch * F.softplus(h) * others
        G = torch.autograd.grad((mu * margins).sum(), list(theta.values()), create_graph=True)
        residual = sum((left[k] - ea ** (1 - rates[k]) * g).square().sum() for k, g in zip(theta, G, strict=True))
        dual = (1 - ea * smallest_margins(margins, latents.labels)).relu().square().mean()
        excess = ((x - objective.upper).relu() + (objective.lower - x).relu()) / half
        loss = residual / whole + feasibility * dual + excess.square().sum() / batch
        optimizer.zero_grad()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        return float(loss.detach())

    return step
