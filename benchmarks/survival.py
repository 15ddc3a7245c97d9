"""Kill ranks with SIGKILL at random moments, resume, and compare bitwise with the run that nobody disturbed.

``python -m benchmarks.survival [--trials 30] [--seed 0] [--quick] [--keep DIR]``
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import random_classifier, show, write_result
from benchmarks.launched import LaunchedRun, differences

RANKS, STEPS, EVERY = 2, 60, 10
ENDED_WITHIN = 30.0
SETTINGS = (
    f"steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "global_batch=64",
    "device=cpu",
    "alpha.pilot_steps=5",
    "log.every=1",
    "log.progress=false",
    "log.images_every=1000",
)
VICTIMS: tuple[tuple[int, ...], ...] = ((0,), (1,), (0, 1))
MOMENTS = ("start", "early", "step", "step", "publishing")


@dataclass(frozen=True)
class Plan:
    """One kill: whom, and when.

    Attributes:
        ranks: that get SIGKILL.
        moment: ``start`` (``delay`` seconds after all ranks exist), ``step`` or ``early`` (once metrics.jsonl shows ``step``;
            early: before the first checkpoint), ``publishing`` (while a checkpoint after ``step`` is being written).
        step: see ``moment``.
        delay: seconds after the moment has come.
    """

    ranks: tuple[int, ...]
    moment: str
    step: int
    delay: float


@dataclass(frozen=True)
class Killed:
    """Outcome of a kill.

    Attributes:
        ranks: Killed ranks.
        moment: Moment of the kill, from the plan.
        step: Last step in metrics.jsonl at the kill.
        checkpoint: Step of the newest checkpoint at the kill.
        seconds: Seconds until every process of the run had ended; None if longer than ``ENDED_WITHIN``.
        named_by: Reporters that named every killed rank: ``run``, ``torchrun`` or both.
    """

    ranks: tuple[int, ...]
    moment: str
    step: int
    checkpoint: int
    seconds: float | None
    named_by: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One run: its kills, and in what its end differs from the undisturbed run's (nothing: bitwise equal)."""

    kills: tuple[Killed, ...]
    finished: bool
    differs: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """All ended in time and were named, and the end is the same bits."""
        return self.finished and not self.differs and all(k.seconds is not None and k.named_by for k in self.kills)


def random_plan(chance: random.Random, after: int = 0) -> Plan:
    """A random kill, at a step after ``after`` where the run was killed there before."""
    moment = chance.choice(MOMENTS if not after else MOMENTS[2:])
    first, last = (1, EVERY - 2) if moment == "early" else (after + 1, STEPS - 2)
    delay = chance.uniform(0, 8) if moment == "start" else chance.choice((0.0, chance.uniform(0, 0.01)))
    return Plan(chance.choice(VICTIMS), moment, chance.randint(min(first, last), last), delay)


def kill(run: LaunchedRun, plan: Plan) -> Killed | None:
    """Carry ``plan`` out on a run that was just started, and wait for its end; None where it finished before.

    Raises:
        RuntimeError: the run failed by itself.
    """
    ranks = run.ranks(RANKS)
    while run.alive() and ranks and not _has_come(run, plan):
        time.sleep(0.0005)
    time.sleep(plan.delay)
    step, checkpoint = run.logged_step(), run.published_step()
    if not run.kill([ranks[rank] for rank in plan.ranks if rank in ranks]):
        if not run.finish():
            raise RuntimeError(f"the run failed before anything was killed:\n{run.output()}")
        return None
    began = time.monotonic()
    ended = run.wait(ENDED_WITHIN, list(ranks.values()))
    seconds = time.monotonic() - began if ended else None
    return Killed(plan.ranks, plan.moment, step, checkpoint, seconds, run.named_by(plan.ranks, RANKS))


def _has_come(run: LaunchedRun, plan: Plan) -> bool:
    if plan.moment == "start":
        return True
    return run.logged_step() >= plan.step and (plan.moment != "publishing" or run.is_publishing())


def attempt(
    start: Callable[[Path], LaunchedRun], plans: Sequence[Plan], run_dir: Path, undisturbed: Path
) -> Trial | None:
    """Start a run, kill it by each plan, resume it to its end; None if it finished before a kill.

    Raises:
        RuntimeError: the run failed by itself.
    """
    kills = []
    for plan in plans:
        with start(run_dir) as run:
            killed = kill(run, plan)
        if killed is None:
            return None
        kills.append(killed)
    with start(run_dir) as run:
        finished = run.finish()
    return Trial(tuple(kills), finished, tuple(differences(undisturbed, run_dir)) if finished else ("unfinished",))


def survive(trials: int, seed: int, scratch: Path) -> Iterator[Trial]:
    """Make the trials one after the other, in folders of ``scratch``; every third run is killed twice.

    Raises:
        RuntimeError: a run failed by itself.
    """
    chance = random.Random(seed)
    classifier = random_classifier(scratch / "classifier")

    def start(run_dir: Path) -> LaunchedRun:
        return LaunchedRun(RANKS, run_dir, [f"classifier={classifier}", *SETTINGS])

    undisturbed = scratch / "undisturbed"
    with start(undisturbed) as run:
        if not run.finish():
            raise RuntimeError(f"the undisturbed run failed:\n{run.output()}")
    for number in range(1, trials + 1):
        trial, run_dir = None, scratch / f"trial{number}"
        while trial is None:
            plans = [random_plan(chance)]
            if number % 3 == 0:
                plans.append(random_plan(chance, plans[0].step))
            trial = attempt(start, plans, run_dir, undisturbed)
            run_dir = run_dir.with_name(f"{run_dir.name}again")
        yield trial


def row(number: int, trial: Trial) -> dict[str, Any]:
    """A trial as a line of the table."""

    def each(values: list[str]) -> str:
        return ", then ".join(values)

    return {
        "trial": number,
        "killed": each(["all" if len(k.ranks) > 1 else f"rank {k.ranks[0]}" for k in trial.kills]),
        "moment": each([k.moment for k in trial.kills]),
        "step (checkpoint)": each([f"{k.step} ({k.checkpoint})" for k in trial.kills]),
        "ended after s": each(["never" if k.seconds is None else f"{k.seconds:.1f}" for k in trial.kills]),
        "named by": each([" and ".join(k.named_by) or "nobody" for k in trial.kills]),
        "bitwise": "no: " + ", ".join(trial.differs) if trial.differs else "yes",
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survival", description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="3 trials, and no result file")
    parser.add_argument("--keep", type=Path, help="a folder for the runs and their output; default: a temporary one")
    args = parser.parse_args()
    trials: list[Trial] = []
    with contextlib.ExitStack() as held:
        scratch = args.keep or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="survival-")))
        for trial in survive(3 if args.quick else args.trials, args.seed, scratch):
            trials.append(trial)
            print(row(len(trials), trial), flush=True)
    show("kill -9, then the same command again", [row(n, t) for n, t in enumerate(trials, 1)])
    kills = [k for t in trials for k in t.kills]
    summary = {
        "trials": len(trials),
        "kills": len(kills),
        "bitwise": sum(t.finished and not t.differs for t in trials),
        "named": sum(bool(k.named_by) for k in kills),
        "ended": sum(k.seconds is not None for k in kills),
        "slowest_end_seconds": max((k.seconds for k in kills if k.seconds is not None), default=None),
    }
    print(summary)
    if not args.quick:
        settings = {"seed": args.seed, "ranks": RANKS, "overrides": SETTINGS}
        write_result("survival", settings, summary=summary, trials=[asdict(t) for t in trials])
    if not all(t.passed for t in trials):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
