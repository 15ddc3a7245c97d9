"""A task's own report: a file in its folder, complete or absent, written by the process that works on the task."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hpc_c2g.files import write_atomically
from hpc_c2g.studies.tasks import Task, TaskInfo

KEPT = 20
"""Number of earlier attempts that are kept."""


@dataclass
class Report:
    """Outcome of a task's last attempt and a history of those before, as ``STAGE.report.json`` holds them.

    Attributes:
        id: Id of the task; a report of another id (other settings) is ignored.
        state: ``running``, ``interrupted`` (saved, to be resumed), ``done``, ``failed`` or ``blocked`` (an input is missing).
        attempts: Number of attempts so far.
        failures: Number of attempts that failed by their own fault.
        cause: Cause of the last failure, in one line.
        job: Id of the job that makes or made the last attempt.
        node: Host of that attempt.
        restart: Number of times that Slurm had restarted the job.
        began: Start of the last attempt, in seconds since 1970.
        ended: End of the last attempt; None while it runs.
        seconds: Seconds of each phase of the last attempt.
        alarms: Failure signatures that fired when it ended.
        results_version: The stage's ``RESULTS_VERSION`` in the code that ran.
        versions: Versions of Python, torch and hpc_c2g.
        history: Earlier attempts, at most ``KEPT``.
    """

    id: str
    state: str = "running"
    attempts: int = 0
    failures: int = 0
    cause: str = ""
    job: str = ""
    node: str = ""
    restart: int = 0
    began: float = 0.0
    ended: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    results_version: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def next_attempt(self, job: str, node: str, restart: int) -> None:
        """Begin another attempt; an earlier one that still counts as running was killed before it could report."""
        if self.attempts:
            outcome = "cut off" if self.state == "running" else self.state
            last = {"attempt": self.attempts, "job": self.job, "node": self.node, "began": self.began}
            self.history = [*self.history, {**last, "ended": self.ended, "outcome": outcome, "cause": self.cause}][
                -KEPT:
            ]
        self.state, self.attempts, self.cause = "running", self.attempts + 1, ""
        self.job, self.node, self.restart = job, node, restart
        self.began, self.ended, self.seconds = time.time(), None, {}

    def end(self, state: str, cause: str = "") -> None:
        """End the attempt; one that failed adds to the failures."""
        self.state, self.cause, self.ended = state, " ".join(cause.split())[:500], time.time()
        self.failures += state == "failed"


_FIELDS = frozenset(f.name for f in fields(Report))


def report_file(study: Path, task: Task | TaskInfo) -> Path:
    """Return the path of the task's report."""
    return study / task.folder / f"{task.stage}.report.json"


def read_report(study: Path, task: Task | TaskInfo) -> Report | None:
    """Return the task's report; None if there is none, or one of another id, or a damaged one."""
    return load_report(f"{study}/{task.folder}/{task.stage}.report.json", task.id)


def load_report(file: Path | str, task_id: str) -> Report | None:
    """Return the report in ``file``; None under the same conditions as ``read_report``."""
    try:
        with open(file, "rb") as content:
            values = json.loads(content.read())
        report = Report(**{k: v for k, v in values.items() if k in _FIELDS})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return report if report.id == task_id else None


def write_report(study: Path, task: Task | TaskInfo, report: Report) -> None:
    """Write the report in one piece.

    Raises:
        UserError: The folder cannot be written.
    """
    write_atomically(report_file(study, task), json.dumps(asdict(report), indent=1).encode())
