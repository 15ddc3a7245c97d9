"""A generator training run from its configuration to its last checkpoint. Sees classifier bundles and no data."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.denormals import flushed_denormals
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import C2GError
from hpc_c2g.monitoring.images import grid, save_png, zoom_for
from hpc_c2g.monitoring.run_log import RunLog, due
from hpc_c2g.training.assembly import Assembly, Parts, lay_out
from hpc_c2g.training.bundles import class_counts, load_bundles
from hpc_c2g.training.checkpoints import Checkpoint, Checkpoints
from hpc_c2g.training.config import TrainConfig
from hpc_c2g.training.engine import import_deepspeed
from hpc_c2g.training.introduction import hyperparameters, introduction
from hpc_c2g.training.phases import shares
from hpc_c2g.training.pilot import pilot_alphas
from hpc_c2g.training.preemption import Preempted, PreemptionFlag
from hpc_c2g.training.run_directory import RunDirectory
from hpc_c2g.training.watch import Watch, of_samples, stopped


@dataclass(frozen=True)
class RunResult:
    """Where a finished run lies, and the steps that this call made (0 where it was complete already)."""

    run_dir: Path
    steps_made: int


@flushed_denormals()
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
    if not config.deterministic:
        import_deepspeed()  # before the process group is made
    world = world or World.start(config.device, config.deterministic)
    bundles = world.agreed(lambda: load_bundles(config.members))
    # before signals become a flag: where a rank dies while groups are made, the launcher's SIGTERM must end the others at once
    mesh = lay_out(config, world)
    with contextlib.ExitStack() as held, PreemptionFlag() as preemption:

        def hold() -> None:
            held.enter_context(RunDirectory(config))

        world.from_first(hold)
        return _train(config, bundles, mesh, preemption)


def _train(config: TrainConfig, bundles: list[Bundle], mesh: Mesh, preemption: PreemptionFlag) -> RunResult:
    world, run_dir = mesh.world, Path(config.run_dir)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint)
    resumed = world.from_first(lambda: getattr(checkpoints.latest(), "step", 0))
    checkpoint = world.agreed(lambda: checkpoints.at(resumed)) if resumed else None
    fingerprints = [bundle.fingerprint for bundle in bundles]
    if checkpoint and checkpoint.state.get("classifiers") != fingerprints:
        raise C2GError(
            f"run_dir={run_dir} holds a run of another classifier than classifier={config.classifier}",
            "choose another run_dir, or the classifier that the run began with",
        )
    if resumed >= config.steps:
        return RunResult(run_dir, 0)

    def asked_to_stop() -> str | None:
        return world.any(preemption.signal_name)  # read once: a signal may come at any moment, to any rank

    def boundary() -> None:
        if stop := asked_to_stop():
            raise Preempted(stop, 0)

    layout = {"world_size": world.size, "asked": str(config.micro_batch), "groups": str(config.distributed.groups)}
    before = checkpoint.state["layout"] if checkpoint else {}
    same = all(before.get(name) == value for name, value in layout.items())
    assembly = Assembly.of(config, bundles, mesh, before.get("micro_batch") if same else None)
    parts = _started(assembly, checkpoint, boundary)
    watch = Watch(config.alarms, config.steps, checkpoint.state.get("watch") if checkpoint else None)
    del checkpoint  # of the size of the generator and its moments

    def state() -> dict[str, Any]:
        kept = {**layout, "micro_batch": assembly.micro_batch}
        own = {"classifiers": fingerprints, "layout": kept, "watch": watch.state_dict()}
        return {**parts.state_dict(), **own}

    classes = class_counts(bundles)
    with contextlib.ExitStack() as open_files, checkpoints:
        log = open_files.enter_context(_log(config, resumed, assembly)) if world.is_first else None
        phases, verdict = parts.step.phases, watch.verdict
        phases.start()
        for step in range(resumed + 1, config.steps + 1):
            watched = due(step, config.log.every, config.steps)
            result = parts.step(step, watched, verdict.ease)
            scalars = result.scalars
            if watched:
                scalars = {**scalars, **shares(phases.take(), world)}
                if log:  # rank 0 looks for all
                    scalars |= of_samples(result.bands, classes, config.prefixes)
                verdict = world.from_first(functools.partial(watch.look, step, scalars))
            if log:
                log.step(step, {**scalars, **verdict.scalars} if watched else scalars, verdict.begun if watched else ())
            if due(step, config.log.images_every, config.steps):
                _draw(parts, log, step, config)
            phases.mark("log")
            failing = watched and verdict.firing and config.alarms.policy == "stop"
            stop = asked_to_stop()
            if checkpoints.due(step, config.steps) or stop or failing:
                publish = checkpoints.publish if stop or failing else checkpoints.publish_later
                world.from_first(functools.partial(publish, step, state()))  # every rank has its part in the state
            phases.mark("checkpoint")
            if failing:
                raise stopped(step, verdict)
            if stop and step < config.steps:
                raise Preempted(stop, step)
        world.from_first(checkpoints.finish)
    return RunResult(run_dir, config.steps - resumed)


def _started(assembly: Assembly, checkpoint: Checkpoint | None, boundary: Callable[[], None]) -> Parts:
    """The parts at the checkpoint, or at the beginning."""
    if checkpoint is None:
        solutions = assembly.config.solutions  # of one classifier start at one alpha
        alphas = pilot_alphas(assembly.bundles[::solutions], assembly.config, assembly.world, boundary)
        return assembly.parts([alpha for alpha in alphas for _ in range(solutions)])
    parts = assembly.parts([0.0] * len(assembly.bundles))
    parts.load_state_dict(checkpoint.state)
    return parts


def _log(config: TrainConfig, resumed: int, assembly: Assembly) -> RunLog:
    log = RunLog(Path(config.run_dir), config.log, config.steps, config.global_batch, resumed)
    log.introduce(introduction(assembly), hyperparameters(config), config.prefixes)
    for advice in assembly.advice() if config.log.progress and not resumed else ():
        log.say(advice)
    return log


def _draw(parts: Parts, log: RunLog | None, step: int, config: TrainConfig) -> None:
    """Grids of samples; at the last step samples.png too, before the last checkpoint: complete means all."""
    trained = parts.trained()
    if log is None or trained is None:
        return
    count = len(config.classifiers)
    for k in range(count) if count > 1 else ():
        log.images(step, f"classifier{k}/samples", *trained.only(k).picture(config.seed))
    images, columns = trained.picture(config.seed)
    log.images(step, "samples", images, columns)
    if step == config.steps:
        save_png(grid(images, columns), Path(config.run_dir) / "samples.png", zoom_for(images.shape[-1]))
