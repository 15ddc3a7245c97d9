"""What a task tells of itself: a file in its own folder, complete or absent, written by whoever works on the task and read by all."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hpc_c2g.files import write_atomically
from hpc_c2g.studies.tasks import Placed

KEPT = 20
"""Attempts whose story is kept."""
FINAL = ("done", "failed", "blocked")


@dataclass
class Report:
    """How far a task is.

    Attributes:
        id: of the task that it tells of: a report of other settings counts for nothing.
        state: ``running``, ``interrupted`` (saved, to be gone on with), ``done``, ``failed`` or ``blocked`` (what it builds on is missing).
        attempts: how often it was started.
        failures: how often it failed for a reason of its own.
        cause: of the last failure, in a line.
        job: the job that works or worked on it.
        node: where.
        restart: how often Slurm had restarted that job.
        began: when the last attempt began, seconds since 1970.
        ended: when it ended.
        seconds: phases of the last attempt.
        alarms: signatures of failure that fired when it ended.
        code: version of the code that ran.
        versions: of Python, torch and hpc_c2g.
        history: of earlier attempts.
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
    code: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def next_attempt(self, job: str, node: str, restart: int) -> None:
        """Begin another attempt; one that was running was cut off without a word."""
        if self.attempts:
            outcome = "cut off" if self.state == "running" else self.state
            told = {"attempt": self.attempts, "job": self.job, "node": self.node, "began": self.began}
            self.history = [*self.history, {**told, "ended": self.ended, "outcome": outcome, "cause": self.cause}][
                -KEPT:
            ]
        self.state, self.attempts, self.cause = "running", self.attempts + 1, ""
        self.job, self.node, self.restart = job, node, restart
        self.began, self.ended, self.seconds = time.time(), None, {}

    def end(self, state: str, cause: str = "") -> None:
        """Close the attempt; one that failed adds to the failures."""
        self.state, self.cause, self.ended = state, " ".join(cause.split())[:500], time.time()
        self.failures += state == "failed"


def report_file(study: Path, task: Placed) -> Path:
    """Where a task's report lies."""
    return study / task.folder / f"{task.stage}.report.json"


def read_report(study: Path, task: Placed) -> Report | None:
    """The task's report; None where there is none, or one of other settings, or a damaged one."""
    return load_report(report_file(study, task), task.id)


def load_report(file: Path | str, task_id: str) -> Report | None:
    """As ``read_report``, from the file itself."""
    try:
        with open(file, "rb") as content:
            values = json.loads(content.read())
        report = Report(**{f.name: values[f.name] for f in fields(Report) if f.name in values})
    except (OSError, ValueError, TypeError):
        return None
    return report if report.id == task_id else None


def write_report(study: Path, task: Placed, report: Report) -> None:
    """Publish it.

    Raises:
        UserError: the folder cannot be written.
    """
    write_atomically(report_file(study, task), json.dumps(asdict(report), indent=1).encode())
