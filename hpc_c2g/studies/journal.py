"""The study's journal: what its launcher planned and handed out, one JSON object per line, only ever appended to.

A submission is recorded before the scheduler receives it, so that a launcher that is killed in between is recovered by the job's name.
The launcher alone writes, under the study's lease. A line that was cut off by a crash was never acknowledged: readers ignore it, the next
writer removes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

from hpc_c2g.errors import UserError
from hpc_c2g.files import cannot_write, sync_folder
from hpc_c2g.studies.config import STAGES
from hpc_c2g.studies.submissions import Submission, find_submissions
from hpc_c2g.studies.tasks import TaskInfo, find_specs

FILE = "journal.jsonl"


@dataclass
class Journal:
    """The journal of one study, replayed: what its lines amount to.

    Attributes:
        study: Folder of the study.
        tasks: Tasks of the study by id, in the order in which they were planned.
        jobs: Id of the job that each task was last handed to, such as ``123_4``, by task id.
        submitted: Token of each task's last submission to a scheduler, by task id.
        max_failures: Raised limits of failures, by task id.
        pending: Name of the job of each submission whose own job id is not known, by token.
        members: Ids of the tasks of each submission, in the order of the array, by token.
    """

    study: Path
    tasks: dict[str, TaskInfo] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    submitted: dict[str, str] = field(default_factory=dict)
    max_failures: dict[str, int] = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)

    def ordered_tasks(self) -> list[TaskInfo]:
        """Return the study's tasks, by stage and in the order of the grid; from their descriptions if none was recorded."""
        tasks = self.tasks.values() or [task.info for task in find_specs(self.study)]
        return sorted(tasks, key=lambda task: STAGES.index(task.stage))

    def limit_of(self, task: str, retries: int) -> int:
        """Return the number of failures after which a task is still tried again, ``retries`` unless it was raised."""
        return max(retries, self.max_failures.get(task, 0))

    def plan(self, tasks: Iterable[TaskInfo]) -> None:
        """Record the study's tasks; those that are recorded already are left out."""
        new = [task for task in tasks if self.tasks.get(task.id) != task]
        self._append(*({"event": "planned", "task": asdict(task)} for task in new))

    def begin(self, submission: Submission) -> None:
        """Record that the scheduler is about to receive a submission."""
        ids = [e.id for e in submission.elements]
        self._append({"event": "begun", "token": submission.token, "name": submission.name, "tasks": ids})

    def submit(self, token: str, job: str) -> None:
        """Record the job id that the scheduler gave to a submission."""
        self._append({"event": "submitted", "token": token, "job": job})

    def withdraw(self, token: str) -> None:
        """Record that the scheduler never received a submission, or that it was cancelled at once."""
        self._append({"event": "withdrawn", "token": token})

    def start(self, task: str, job: str) -> None:
        """Record a process of this machine that works on a task."""
        self._append({"event": "started", "task": task, "job": job})

    def set_max_failures(self, limits: dict[str, int]) -> None:
        """Record limits of failures, by task id, that hold from now on."""
        if limits:
            self._append({"event": "max_failures", "limits": limits})

    def _append(self, *events: dict[str, Any]) -> None:
        """Append a line per event, flush them to the disk, and apply them.

        Raises:
            UserError: The file cannot be written.
        """
        file = self.study / FILE
        try:
            new = not file.exists()
            with open(file, "ab", buffering=0) as out:
                whole = out.tell()
                try:
                    _write_all(out, b"".join(json.dumps(event).encode() + b"\n" for event in events))
                    os.fsync(out.fileno())
                except OSError:
                    out.truncate(whole)  # on a full disk: the next line must not continue half of this one
                    raise
            if new:
                sync_folder(self.study)
        except OSError as error:
            raise cannot_write(file, error) from error
        for event in events:
            self.apply(event)

    def apply(self, event: dict[str, Any]) -> None:
        """Take one line into account."""
        kind = event["event"]
        if kind == "planned":
            info = TaskInfo(**event["task"])
            self.tasks[info.id] = replace(info, upstream=tuple(info.upstream))
        elif kind == "begun":
            token, ids = event["token"], event["tasks"]
            self.pending[token], self.members[token] = event["name"], ids
            self.submitted.update(dict.fromkeys(ids, token))
            self._forget_jobs(ids)
        elif kind == "submitted":
            token, job = event["token"], event["job"]
            self.pending.pop(token, None)
            ids = self.members[token]
            for i, task in enumerate(ids):
                if self.submitted.get(task) == token:
                    self.jobs[task] = f"{job}_{i}" if len(ids) > 1 else job
        elif kind == "withdrawn":
            token = event["token"]
            self.pending.pop(token, None)
            ids = [task for task in self.members[token] if self.submitted.get(task) == token]
            for task in ids:
                del self.submitted[task]
            self._forget_jobs(ids)
        elif kind == "started":
            self.jobs[event["task"]] = event["job"]
            self.submitted.pop(event["task"], None)
        elif kind == "max_failures":
            self.max_failures.update(event["limits"])
        else:
            raise ValueError(f"event {kind!r} is unknown")

    def _forget_jobs(self, ids: Iterable[str]) -> None:
        for task in ids:
            self.jobs.pop(task, None)


def read_journal(study: Path) -> Journal:
    """Return the study's journal; an empty one if nothing was handed out yet.

    Raises:
        UserError: The file cannot be read, or a line before the last is damaged.
    """
    file, journal = study / FILE, Journal(study)
    for number, line in enumerate(_whole_lines(file), 1):
        try:
            journal.apply(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"line {number} of {file} is damaged: {error!r}",
                "restore the file, or `c2g cancel` the study's jobs and remove the line",
            ) from error
    return journal


def open_journal(study: Path) -> Journal:
    """Return the study's journal for its launcher, which holds the study's lease; a line that was cut off is removed.

    A journal that was lost is begun again with every submission that the study's folder describes, as pending: those whose jobs are still
    in the queue are then found by their names, and not submitted a second time.

    Raises:
        UserError: As ``read_journal``; or the file cannot be written.
    """
    file = study / FILE
    try:
        lost = not file.exists()
        if not lost:
            with open(file, "rb+") as content:
                whole = content.read().rfind(b"\n") + 1
                content.truncate(whole)
    except OSError as error:
        raise cannot_write(file, error) from error
    journal = read_journal(study)
    for submission in find_submissions(study) if lost else ():
        journal.begin(submission)
    return journal


def _write_all(out: FileIO, content: bytes) -> None:
    """Write all of ``content``; one call may write a part of it."""
    while content:
        content = content[out.write(content) :]


def _whole_lines(file: Path) -> list[bytes]:
    """Return the lines that end; a last one without an end is being written, or was cut off."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}", "check its permissions") from error
    return content[: content.rfind(b"\n") + 1].splitlines()
