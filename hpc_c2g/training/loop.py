"""Training run of a generator, from its configuration to its last checkpoint. Reads classifier bundles and no data."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.denormals import flush_denormals
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.kkt.loss_terms import loss_names
from hpc_c2g.monitoring.images import grid, save_png, zoom_for
from hpc_c2g.monitoring.profiler import StepProfiler
from hpc_c2g.monitoring.run_log import RunLog, due
from hpc_c2g.training.checkpoints import Checkpoint, Checkpoints
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.engines.deepspeed_engine import import_deepspeed
from hpc_c2g.training.failure_monitor import FailureMonitor, sample_scalars, stop_error
from hpc_c2g.training.pilot import pilot_alphas
from hpc_c2g.training.preemption import Preempted, PreemptionFlag
from hpc_c2g.training.run_directory import RunDirectory
from hpc_c2g.training.run_summary import hyperparameters, run_summary, start_message
from hpc_c2g.training.step.bundles import class_counts, load_bundles
from hpc_c2g.training.step.phases import shares
from hpc_c2g.training.trainer import Trainer, TrainerSetup, build_mesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """Run directory of a finished run, and the number of steps that this call made (0 if it was complete already)."""

    run_dir: Path
    steps_made: int


@flush_denormals()
def train(config: TrainConfig, world: World | None = None) -> RunResult:
    """Train, or resume from the newest checkpoint in ``config.run_dir``.

    Every rank calls this with the same configuration; rank 0 holds the run directory and writes into it.

    Args:
        config: Settings of the run.
        world: All ranks; None reads the launch environment.

    Raises:
        UserError: Bad input (see the modules it comes from), or a non-finite term before an update; on every rank.
        Preempted: A signal requested to stop; a checkpoint was published.
    """
    if not config.deterministic:
        import_deepspeed()  # before the process group is initialized
    world = world or World.start(config.device, config.deterministic)
    bundles = world.raise_on_all_ranks(lambda: load_bundles(config.members))
    # before signals become a flag: if a rank dies while groups are initialized, the launcher's SIGTERM must end the others at once
    mesh = build_mesh(config, world)
    with contextlib.ExitStack() as held, PreemptionFlag() as preemption:

        def hold() -> None:
            held.enter_context(RunDirectory(config))

        world.broadcast_from_rank0(hold)
        return _train(config, bundles, mesh, preemption)


def _train(config: TrainConfig, bundles: list[Bundle], mesh: Mesh, preemption: PreemptionFlag) -> RunResult:
    world, run_dir = mesh.world, Path(config.run_dir)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint)
    resumed = world.broadcast_from_rank0(lambda: getattr(checkpoints.latest(), "step", 0))
    checkpoint = world.raise_on_all_ranks(lambda: checkpoints.at(resumed)) if resumed else None
    fingerprints = [bundle.fingerprint for bundle in bundles]
    if checkpoint and checkpoint.state.get("classifiers") != fingerprints:
        raise UserError(
            f"run_dir={run_dir} holds a run of another classifier than classifier={config.classifier}",
            "choose another run_dir, or the classifier that the run began with",
        )
    if resumed >= config.steps:
        return RunResult(run_dir, 0)

    profiler = StepProfiler(config.profiler, run_dir, world.rank, world.size, world.device)

    def asked_to_stop() -> str | None:
        return world.any_rank(preemption.signal_name)  # read once: a signal may come at any moment, to any rank

    def boundary() -> None:
        if stop := asked_to_stop():
            raise Preempted(stop, 0)

    layout = {"world_size": world.size, "asked": str(config.micro_batch), "groups": str(config.distributed.groups)}
    before = checkpoint.state["layout"] if checkpoint else {}
    same = all(before.get(name) == value for name, value in layout.items())
    setup = TrainerSetup.create(config, bundles, mesh, before.get("micro_batch") if same else None)
    logger.info(start_message(setup))
    trainer = _started(setup, checkpoint, boundary)
    monitor = FailureMonitor(config.alarms, config.steps, checkpoint.state.get("watch") if checkpoint else None)
    del checkpoint  # of the size of the generator and its moments

    def state() -> dict[str, Any]:
        kept = {**layout, "micro_batch": setup.micro_batch}
        own = {"classifiers": fingerprints, "layout": kept, "watch": monitor.state_dict()}
        return {**trainer.state_dict(), **own}

    classes = class_counts(bundles)
    with contextlib.ExitStack() as open_files, checkpoints, profiler:
        log = open_files.enter_context(_log(config, resumed, setup)) if world.is_rank0 else None
        phases, monitor_state = trainer.step.phases, monitor.state
        began = time.perf_counter()
        for step in range(resumed + 1, config.steps + 1):
            profiler.before_step(step)
            watched = due(step, config.log.every, config.steps)
            result = trainer.step(step, watched, monitor_state.lr_scale)
            phases.enter("log")
            scalars = result.scalars
            if watched:
                scalars = {**scalars, **shares(phases.take(), world)}
                if log:  # rank 0 checks for all ranks
                    scalars |= sample_scalars(result.sample_stats, classes, config.prefixes)
                monitor_state = world.broadcast_from_rank0(functools.partial(monitor.update, step, scalars))
            if log:
                log.step(
                    step,
                    {**scalars, **monitor_state.scalars} if watched else scalars,
                    monitor_state.newly_firing if watched else (),
                )
            if due(step, config.log.images_every, config.steps):
                _draw(trainer, log, step, config)
            phases.enter("checkpoint")
            failing = watched and monitor_state.firing and config.alarms.policy == "stop"
            stop = asked_to_stop()
            if checkpoints.due(step, config.steps) or stop or failing:
                publish = checkpoints.publish if stop or failing else checkpoints.publish_later
                world.broadcast_from_rank0(
                    functools.partial(publish, step, state())
                )  # every rank contributes to the state
            phases.stop()
            if failing:
                raise stop_error(step, monitor_state)
            if stop and step < config.steps:
                raise Preempted(stop, step)
        world.broadcast_from_rank0(checkpoints.finish)
    seconds = time.perf_counter() - began
    logger.info("finished: %d steps in %.1f s", config.steps - resumed, seconds, extra={"step": config.steps})
    return RunResult(run_dir, config.steps - resumed)


def _started(setup: TrainerSetup, checkpoint: Checkpoint | None, boundary: Callable[[], None]) -> Trainer:
    """Return the trainer, restored from the checkpoint or at the first step."""
    if checkpoint is None:
        solutions = setup.config.solutions  # solutions of one classifier start at the same alpha
        began = time.perf_counter()
        alphas = pilot_alphas(setup.bundles[::solutions], setup.config, setup.world, boundary)
        if setup.config.alpha.init is None:
            seconds = time.perf_counter() - began
            values = ", ".join(f"{alpha:.4f}" for alpha in alphas)
            logger.info("pilot: alpha starts at %s (%d steps, %.1f s)", values, setup.config.alpha.pilot_steps, seconds)
        return setup.build([alpha for alpha in alphas for _ in range(solutions)])
    trainer = setup.build([0.0] * len(setup.bundles))
    trainer.load_state_dict(checkpoint.state)
    logger.info("resuming after step %d from %s", checkpoint.step, checkpoint.path)
    return trainer


def _log(config: TrainConfig, resumed: int, setup: TrainerSetup) -> RunLog:
    log = RunLog(Path(config.run_dir), config.log, config.steps, config.global_batch, resumed)
    log.log_run_summary(run_summary(setup), hyperparameters(config), config.prefixes, loss_names())
    for advice in setup.advice() if not resumed else ():
        logger.warning(advice)
    return log


def _draw(trainer: Trainer, log: RunLog | None, step: int, config: TrainConfig) -> None:
    """Log grids of samples; at the last step also write samples.png, before the last checkpoint, which marks the run complete."""
    trained = trainer.trained()
    if log is None or trained is None:
        return
    count = len(config.classifiers)
    for k in range(count) if count > 1 else ():
        log.images(step, f"classifier{k}/samples", *trained.only(k).picture(config.seed))
    images, columns = trained.picture(config.seed)
    log.images(step, "samples", images, columns)
    if step == config.steps:
        save_png(grid(images, columns), Path(config.run_dir) / "samples.png", zoom_for(images.shape[-1]))
