"""A generator training run from its configuration to its last checkpoint. Sees a classifier bundle and no data."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc_c2g.classifiers.bundle import Bundle, load_bundle
from hpc_c2g.distributed.reduction import TreeSum
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import C2GError
from hpc_c2g.generators.latents import LatentSampler
from hpc_c2g.generators.networks import build_generator
from hpc_c2g.generators.trained import TrainedGenerator
from hpc_c2g.monitoring.images import drawable, grid, save_png, zoom_for
from hpc_c2g.monitoring.run_log import RunLog, SilentLog
from hpc_c2g.training.adam_engine import AdamEngine
from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config import TrainConfig
from hpc_c2g.training.engine import DeepSpeedEngine
from hpc_c2g.training.objective import Objective
from hpc_c2g.training.pilot import pilot_alpha
from hpc_c2g.training.preemption import Preempted, PreemptionFlag
from hpc_c2g.training.run_directory import RunDirectory
from hpc_c2g.training.step import TrainStep, micro_batches


@dataclass(frozen=True)
class RunResult:
    """Where a finished run lies, and the steps that this call made (0 where it was complete already)."""

    run_dir: Path
    steps_made: int


def train(config: TrainConfig, world: World | None = None) -> RunResult:
    """Train, or go on from the newest checkpoint in ``config.run_dir``.

    Every rank calls this with the same configuration; rank 0 holds the run directory and writes into it.

    Args:
        config: of the run.
        world: the ranks; None reads the launch environment.

    Raises:
        C2GError: bad input (see the modules it comes from), or a non-finite term before an update; on every rank.
        Preempted: a signal asked to stop; a checkpoint was published.
    """
    world = world or World.start(config.device, config.deterministic)
    bundle = load_bundle(config.classifier)
    with contextlib.ExitStack() as held:

        def hold() -> None:
            held.enter_context(RunDirectory(config))

        world.from_first(hold)
        return _train(config, bundle, Path(config.run_dir), world)


def _train(config: TrainConfig, bundle: Bundle, run_dir: Path, world: World) -> RunResult:
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint)
    resumed = world.from_first(lambda: getattr(checkpoints.latest(), "step", 0))
    checkpoint = checkpoints.at(resumed) if resumed else None
    fingerprint = bundle.fingerprint
    if checkpoint and checkpoint.state["classifier"] != fingerprint:
        raise C2GError(
            f"run_dir={run_dir} holds a run of another classifier than classifier={config.classifier}",
            "choose another run_dir, or the classifier that the run began with",
        )
    if resumed >= config.steps:
        return RunResult(run_dir, 0)

    lower, upper = (bound.float() for bound in bundle.normalisation.box())
    classes = len(bundle.classes)
    generator = build_generator(
        config.generator, config.latents.dimensions, classes, config.global_batch, lower, upper, config.seed
    )
    objective = Objective(bundle, config, world.device, torch.float32)
    sampler = LatentSampler(config.latents, classes, config.global_batch, config.steps, config.seed)
    pieces = micro_batches(config, world)
    engine: DeepSpeedEngine | AdamEngine
    if config.deterministic:
        engine = AdamEngine(generator.to(world.device), config.optimiser, TreeSum(world))
    else:
        engine = DeepSpeedEngine(generator, config, len(pieces), world)
    # a resumed run brings its own alpha
    alpha0 = world.from_first(lambda: pilot_alpha(objective, config, world)) if checkpoint is None else 0.0
    train_step = TrainStep(config, objective, sampler, engine, world, alpha0)
    if checkpoint is not None:
        engine.load_state_dict(checkpoint.state["engine"])
        train_step.load_state_dict(checkpoint.state["scale"])

    drawn = build_generator(
        config.generator, config.latents.dimensions, classes, config.global_batch, lower, upper, config.seed
    )  # a whole copy on the CPU: the engine may have shared out its own
    trained = TrainedGenerator.of(bundle, drawn, config.latents.dimensions)

    def state() -> dict[str, Any]:
        return {
            "engine": engine.state_dict(),
            "scale": train_step.state_dict(),
            "trained": trained.state_dict(),
            "classifier": fingerprint,
        }

    with (
        PreemptionFlag() as preemption,
        _log(config, run_dir, resumed, world) as log,
    ):
        for step in range(resumed + 1, config.steps + 1):
            result = train_step(step)
            log.step(step, result.scalars, result.margins, result.multipliers)
            if _images_due(config, step) and drawable(bundle.input_shape):
                drawn.load_state_dict(engine.weights())  # by every rank
                if world.is_first:
                    images, columns = trained.picture(config.seed)
                    log.images(step, images, columns)
                    if step == config.steps:  # before the last checkpoint: complete means all
                        save_png(grid(images, columns), run_dir / "samples.png", zoom_for(images.shape[-1]))
            stop = world.any(preemption.signal_name)  # read once: it may come at any moment, to any rank
            if checkpoints.due(step, config.steps) or stop:
                content = state()  # by every rank
                world.from_first(lambda step=step, content=content: checkpoints.publish(step, content))  # type: ignore[misc]
            if stop and step < config.steps:
                raise Preempted(stop, step)
    return RunResult(run_dir, config.steps - resumed)


def _images_due(config: TrainConfig, step: int) -> bool:
    """As ``RunLog.images_due``, on every rank."""
    return step % config.log.images_every == 0 or step in (1, config.steps)


def _log(config: TrainConfig, run_dir: Path, resumed: int, world: World) -> RunLog | SilentLog:
    if not world.is_first:
        return SilentLog()
    return RunLog(run_dir, config.log, config.steps, config.global_batch, resumed)
