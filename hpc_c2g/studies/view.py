"""Where every task stands now: from the ledger, the tasks' own reports, and the scheduler's queue. Reads, and writes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_c2g.files import last_line
from hpc_c2g.lease import live_holder
from hpc_c2g.monitoring.signatures import firing
from hpc_c2g.scheduling.queue import Entry
from hpc_c2g.studies.config import NEEDS
from hpc_c2g.studies.ledger import Row
from hpc_c2g.studies.reports import Report, load_report

STATES = ("new", "pending", "requeued", "running", "done", "failed", "blocked", "interrupted", "lost", "cancelled")
"""new: not submitted. pending, requeued, running: the scheduler has it. failed: for a reason of its own. blocked: what it builds on
failed. interrupted: saved, nobody works on it. lost: it was at work, and vanished without a word. cancelled: by a person."""
ACTIVE = ("pending", "requeued", "running")


@dataclass(frozen=True)
class View:
    """A task, and where it stands.

    Attributes:
        row: what the ledger says.
        state: one of ``STATES``.
        report: the task's own, if newer than the ledger; None where the ledger says it all.
        reason: why it waits or failed, in a line.
    """

    row: Row
    state: str
    report: Report | None
    reason: str

    @property
    def attempts(self) -> int:
        """So far."""
        return self.report.attempts if self.report else self.row.attempts

    @property
    def failures(self) -> int:
        """So far."""
        return self.report.failures if self.report else self.row.failures

    @property
    def alarms(self) -> tuple[str, ...]:
        """Signatures of failure that fired when the last attempt ended."""
        return tuple(self.report.alarms) if self.report else self.row.alarms

    @property
    def given_up(self) -> bool:
        """Whether it failed more often than allowed."""
        return self.state == "failed" and self.failures > self.row.allowed


@dataclass(frozen=True)
class Progress:
    """How far a training run is.

    Attributes:
        step: its last logged one.
        residual: there.
        alarms: signatures of failure that fired there.
    """

    step: int
    residual: float
    alarms: tuple[str, ...]


def look(study: Path, rows: Sequence[Row], queue: Mapping[str, Entry] | None) -> list[View]:
    """Every task's view, in the order of ``rows``.

    Args:
        study: its folder.
        rows: of the ledger.
        queue: of the scheduler, by job; None where there is none, or it does not answer: then what it would know is taken from
            leases and reports.
    """
    root, views, stuck = str(study), [], set[str]()
    for row in rows:
        if row.state == "done":
            views.append(View(row, "done", None, ""))
            continue
        # nobody ever worked on what was never handed out: its report need not be looked for
        handed_out = row.submission or row.attempts or row.job
        report = load_report(f"{root}/{row.folder}/{row.stage}.report.json", row.id) if handed_out else None
        view = _stand(study, row, report, (queue or {}).get(row.job), queue is not None)
        if (
            view.state not in ("done", *ACTIVE)
            and handed_out
            and os.path.exists(f"{root}/{row.folder}/{row.stage}.cancelled")
        ):
            view = View(row, "cancelled", report, "by a person")
        if view.state not in ("done", *ACTIVE) and any(u in stuck for u in row.upstream):
            view = View(row, "blocked", report, f"its {NEEDS[row.stage]} was given up")
        if view.given_up or view.state == "blocked":
            stuck.add(row.id)
        views.append(view)
    return views


def _stand(study: Path, row: Row, report: Report | None, entry: Entry | None, asked: bool) -> View:
    state = report.state if report else row.state
    cause = report.cause if report else row.cause
    if state == "done":
        return View(row, "done", report, "")
    if entry is not None:
        if entry.state == "PENDING":
            return View(row, "requeued" if report or entry.restarts else "pending", report, entry.reason or cause)
        return View(row, "running", report, cause if state == "failed" else "")
    if state == "running" or (state == "new" and row.job):
        holder = live_holder(study / row.folder)
        if holder is not None and report is not None and holder.job == report.job:
            return View(row, "running", report, "")
        if state == "running":
            return View(row, "lost", report, f"job {report.job if report else row.job} vanished")
        if not asked and row.submission:  # the queue knows, but does not answer
            return View(row, "pending", report, "the queue does not answer")
        return View(row, "lost", report, f"job {row.job} vanished before it began")
    return View(row, state, report, cause)


def progress(study: Path, row: Row) -> Progress | None:
    """How far a training run is, from its last line of metrics; None where there is none."""
    line = last_line(study / row.folder / "metrics.jsonl")
    if "step" not in line or "stationarity" not in line:
        return None
    return Progress(int(line["step"]), float(line["stationarity"]), firing(line))
