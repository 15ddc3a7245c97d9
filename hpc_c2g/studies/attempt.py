"""One attempt at a task, on every process of its job: hold its lease, do its work, report how it ended.

``python -m hpc_c2g.studies.attempt STUDY SPEC JOB`` or, through submitit, an ``Attempt``. Exit codes: 0 done (now or before), 75 saved
and to be resumed, 3 an input is missing, any other failed.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hpc_c2g.errors import UserError
from hpc_c2g.files import last_line
from hpc_c2g.monitoring.signatures import firing
from hpc_c2g.studies.config import NEEDS
from hpc_c2g.studies.reports import Report, load_report, read_report, write_report
from hpc_c2g.studies.results_version import RESULTS_VERSION
from hpc_c2g.studies.tasks import Task, read_spec
from hpc_c2g.training.preemption import EXIT_PREEMPTED, Preempted

if TYPE_CHECKING:
    from hpc_c2g.distributed.environment import Allocation

EXIT_BLOCKED = 3
FOLLOW_SECONDS = 120.0
"""Seconds that other ranks wait for rank 0 to hold the task; longer than a lease that nobody renews lasts."""


@dataclass(frozen=True)
class Attempt:
    """The pickle that submitit carries to a node: names alone, so that each start reads everything from the disk.

    Attributes:
        study: Folder of the study.
        spec: Path of the task's description, relative to it.
    """

    study: str
    spec: str

    def __call__(self) -> None:
        """Make the attempt and exit with its code."""
        code = attempt(Path(self.study), self.spec)
        if code:
            sys.exit(code)

    def checkpoint(self) -> Any:
        """Return the same attempt for submitit to resubmit, if its handler gets a signal before this module's is installed."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def attempt(study: Path, spec: str, job: str | None = None) -> int:
    """Make one attempt; return the exit code.

    Args:
        study: Folder of the study.
        spec: Path of the task's description, relative to it.
        job: Id of the job where no scheduler gives one.
    """
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        began = time.monotonic()
        task = read_spec(study / spec)
        from hpc_c2g.distributed.environment import allocation  # torch: seconds

        place = allocation(job)
        if place.rank:
            return _follow(study, task, place)
        return _lead(study, task, place, time.monotonic() - began)
    except Preempted as stop:
        print(f"c2g: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED
    except UserError as error:
        print(f"c2g: error: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """Exit at once: outside of training nothing is saved step by step. Training installs its own handlers."""
    raise Preempted(signal.Signals(number).name, 0)


def _lead(study: Path, task: Task, place: Allocation, imported: float) -> int:
    """Make the attempt as rank 0, which holds the task's lease and writes its report."""
    from hpc_c2g.lease import Lease

    if _is_done(study, task):
        return 0
    waited = time.monotonic()
    with Lease(study / task.folder, f"job {place.job} on {place.node}", place.job).acquire(FOLLOW_SECONDS / 2):
        report = read_report(study, task) or Report(task.id)
        if report.state == "done":  # by another, while this one waited
            return 0
        report.next_attempt(place.job, place.node, place.restart)
        report.results_version, report.versions = RESULTS_VERSION[task.stage], _versions()
        report.seconds = {"import": imported, "hold": time.monotonic() - waited}
        missing = _missing(study, task)
        if missing:
            report.end("blocked", missing)
            write_report(study, task, report)
            print(f"c2g: {missing}", file=sys.stderr)
            return EXIT_BLOCKED
        write_report(study, task, report)
        try:
            _work(study, task, report.seconds)
        except Preempted as stop:
            report.end("interrupted", str(stop))
            raise
        except BaseException as error:
            report.end("failed", _cause(error))
            if not isinstance(error, UserError):
                traceback.print_exc()
            print(f"c2g: error: {report.cause}", file=sys.stderr)
            return 1
        else:
            report.end("done")
            return 0
        finally:
            report.alarms = (
                list(firing(last_line(study / task.folder / "metrics.jsonl"))) if task.stage == "train" else []
            )
            write_report(study, task, report)


def _follow(study: Path, task: Task, place: Allocation) -> int:
    """Make the attempt as another rank: work once rank 0 of the same job holds the task, or exit as it does."""
    end = time.monotonic() + FOLLOW_SECONDS
    while time.monotonic() < end:
        report = read_report(study, task)
        if report and report.state == "done":
            return 0
        if report and (report.job, report.restart) == (place.job, place.restart):
            if report.state != "running":
                return EXIT_BLOCKED if report.state == "blocked" else 1
            try:
                _work(study, task, {})
            except UserError as error:
                print(f"c2g: error: rank {place.rank}: {error}", file=sys.stderr)
                return 1
            return 0
        time.sleep(0.1)
    raise UserError(f"rank 0 did not begin {task.stage} {task.id} within {FOLLOW_SECONDS:.0f} s", "see its log")


def _work(study: Path, task: Task, seconds: dict[str, float]) -> None:
    from hpc_c2g.studies.stages import load_stage

    began = time.monotonic()
    work = load_stage(task.stage)
    seconds["import"] = seconds.get("import", 0.0) + time.monotonic() - began
    began = time.monotonic()
    try:
        work(study, task)
    finally:
        seconds["work"] = time.monotonic() - began


def _is_done(study: Path, task: Task) -> bool:
    report = read_report(study, task)
    return report is not None and report.state == "done"


def _missing(study: Path, task: Task) -> str:
    """Return why the task cannot begin; empty if all tasks that it depends on are done."""
    needed = NEEDS[task.stage]
    for folder, upstream in zip(task.inputs, task.upstream, strict=True):
        report = load_report(study / folder / f"{needed}.report.json", upstream)
        if report is None or report.state != "done":
            why = f": {report.cause}" if report and report.cause else ""
            return f"{needed} {upstream} is {report.state if report else 'not there'}{why}"
    return ""


def _cause(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"


def _versions() -> dict[str, str]:
    import platform

    import torch

    import hpc_c2g

    return {"python": platform.python_version(), "torch": str(torch.__version__), "hpc_c2g": hpc_c2g.__version__}


if __name__ == "__main__":
    sys.exit(attempt(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))
