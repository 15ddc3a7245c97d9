"""State of every task now, from its own report, the study's journal and the scheduler's queue. Reads, and writes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_c2g.files import last_line
from hpc_c2g.lease import live_holder
from hpc_c2g.monitoring.signatures import firing
from hpc_c2g.scheduling.queue import Entry
from hpc_c2g.studies.config import NEEDS
from hpc_c2g.studies.journal import Journal, read_journal
from hpc_c2g.studies.reports import Report, read_report
from hpc_c2g.studies.study import read_study
from hpc_c2g.studies.tasks import TaskInfo

STATES = ("new", "pending", "requeued", "running", "done", "failed", "blocked", "interrupted", "lost", "cancelled")
"""new: not submitted. pending, requeued, running: the scheduler has it. failed: by its own fault. blocked: a task that it depends on
was given up, or an input is missing. interrupted: saved, nobody works on it. lost: it was running and vanished without a report.
cancelled: by a person."""
ACTIVE = ("pending", "requeued", "running")


@dataclass(frozen=True)
class TaskStatus:
    """A task and its state.

    Attributes:
        task: The task.
        state: One of ``STATES``.
        reason: Why it waits or failed, in one line.
        attempts: Number of attempts so far.
        failures: Number of attempts that failed by their own fault.
        max_failures: Number of failures after which it is still tried again.
        job: Id of the job that it was last handed to, such as ``123_4``; empty if none is known.
        seconds: Seconds of its last attempt; None while that runs.
        alarms: Failure signatures that fired when the last attempt ended.
    """

    task: TaskInfo
    state: str
    reason: str = ""
    attempts: int = 0
    failures: int = 0
    max_failures: int = 0
    job: str = ""
    seconds: float | None = None
    alarms: tuple[str, ...] = ()

    @property
    def given_up(self) -> bool:
        """True if it failed more often than allowed."""
        return self.state == "failed" and self.failures > self.max_failures


@dataclass(frozen=True)
class Progress:
    """Progress of a training run.

    Attributes:
        step: Last step in its metrics.
        residual: Stationarity residual of that step.
        alarms: Failure signatures that fire there.
    """

    step: int
    residual: float
    alarms: tuple[str, ...]


def read_statuses(study: Path, queue: Mapping[str, Entry] | None) -> list[TaskStatus]:
    """Return the status of every task of a study, by stage and in the order of the grid.

    Args:
        study: Folder of the study.
        queue: Jobs of the scheduler, by id; None if there is no scheduler or it does not answer.

    Raises:
        UserError: The folder holds no study, or its journal is damaged.
    """
    retries = read_study(study).retries
    return task_statuses(study, read_journal(study), retries, queue)


def task_statuses(
    study: Path,
    journal: Journal,
    retries: int,
    queue: Mapping[str, Entry] | None,
    done: Mapping[str, TaskStatus] | None = None,
) -> list[TaskStatus]:
    """Return the status of every task, as ``read_statuses``, from a journal that was read already.

    Args:
        study: Folder of the study.
        journal: Journal of the study.
        retries: Number of failures after which a task is still tried again, unless the journal raised it.
        queue: Jobs of the scheduler, by id; None if there is none or it does not answer: leases and reports decide then.
        done: Statuses of tasks that are known to be done, by id; their reports are not read again.
    """
    statuses, given_up = [], set[str]()
    for task in journal.ordered_tasks():
        if done and task.id in done:
            statuses.append(done[task.id])
            continue
        status = task_status(study, task, journal, retries, queue)
        if status.state not in ("done", *ACTIVE) and any(u in given_up for u in task.upstream):
            status = replace(status, state="blocked", reason=f"its {NEEDS[task.stage]} was given up")
        if status.given_up or status.state == "blocked":
            given_up.add(task.id)
        statuses.append(status)
    return statuses


def task_status(
    study: Path, task: TaskInfo, journal: Journal, retries: int, queue: Mapping[str, Entry] | None
) -> TaskStatus:
    """Return the status of one task for itself, upstream tasks not considered; arguments as in ``task_statuses``."""
    report = read_report(study, task)
    job = journal.jobs.get(task.id, "")
    state, reason = _state(study, task, report, job, task.id in journal.submitted, queue)
    if state not in ("done", *ACTIVE) and os.path.exists(f"{study}/{task.folder}/{task.stage}.cancelled"):
        state, reason = "cancelled", "by a person"
    limit = journal.limit_of(task.id, retries)
    if report is None:
        return TaskStatus(task, state, reason, max_failures=limit, job=job)
    return TaskStatus(
        task,
        state,
        reason,
        attempts=report.attempts,
        failures=report.failures,
        max_failures=limit,
        job=job or report.job,
        seconds=report.ended - report.began if report.ended else None,
        alarms=tuple(report.alarms),
    )


def _state(
    study: Path, task: TaskInfo, report: Report | None, job: str, submitted: bool, queue: Mapping[str, Entry] | None
) -> tuple[str, str]:
    """Return (state, reason) from the report, the job of the journal and the queue."""
    state, cause = (report.state, report.cause) if report else ("new", "")
    if state == "done":
        return "done", ""
    entry = (queue or {}).get(job)
    if entry is not None:
        if entry.state == "PENDING":
            return "requeued" if report or entry.restarts else "pending", entry.reason or cause
        return "running", cause if state == "failed" else ""
    if state == "running" or (state == "new" and job):
        holder = live_holder(study / task.folder)
        if holder is not None and report is not None and holder.job == report.job:
            return "running", ""
        if state == "running":
            return "lost", f"job {report.job if report else job} vanished"
        if queue is None and submitted:  # the scheduler knows, but does not answer
            return "pending", "the queue does not answer"
        return "lost", f"job {job} vanished before it began"
    return state, cause


def progress(study: Path, task: TaskInfo) -> Progress | None:
    """Return the progress of a training run, from the last line of its metrics; None if there is none."""
    line = last_line(study / task.folder / "metrics.jsonl")
    if "step" not in line or "stationarity" not in line:
        return None
    return Progress(int(line["step"]), float(line["stationarity"]), firing(line))
