"""The study's ledger: what the launcher knows of every task, in SQLite's rollback-journal mode.

One process writes at a time, the launcher, which holds the study's lease: write-ahead logs and two writing hosts are unsafe on NFS and
Lustre. Nothing is here alone: tasks, reports and submissions lie in files of their own, from which the ledger is built again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.studies.config import STAGES
from hpc_c2g.studies.reports import Report
from hpc_c2g.studies.submissions import Submission
from hpc_c2g.studies.tasks import Task

FILE = "ledger.sqlite"
SCHEMA = """
create table if not exists tasks (
    id text primary key, stage text not null, folder text not null, label text not null, upstream text not null,
    nodes integer not null, tasks_per_node integer not null,
    state text not null default 'new', attempts integer not null default 0, failures integer not null default 0,
    allowed integer not null default 0, cause text not null default '', job text not null default '',
    submission text not null default '', seconds real, alarms text not null default '', position integer not null);
create table if not exists submissions (token text primary key, name text not null, stage text not null, job text, cluster text not null);
"""


@dataclass(frozen=True)
class Row:
    """A task in the ledger.

    Attributes:
        id: of the task.
        stage: its stage.
        folder: of its results, below the study's.
        label: the fields of the grid that set it apart.
        upstream: ids that it builds on.
        nodes: of its job.
        tasks_per_node: processes on each.
        state: as last reported (see ``Report``), or ``new``.
        attempts: so far.
        failures: so far.
        allowed: failures before it is given up.
        cause: of the last failure.
        job: that worked on it last, or will: ``123_4``.
        submission: token of its last submission.
        seconds: of its last attempt.
        alarms: signatures of failure that fired when that ended.
    """

    id: str
    stage: str
    folder: str
    label: str
    upstream: tuple[str, ...]
    nodes: int
    tasks_per_node: int
    state: str
    attempts: int
    failures: int
    allowed: int
    cause: str
    job: str
    submission: str
    seconds: float | None
    alarms: tuple[str, ...] = ()

    @property
    def given_up(self) -> bool:
        """Whether it failed more often than allowed."""
        return self.state == "failed" and self.failures > self.allowed


COLUMNS = tuple(Row.__dataclass_fields__)


class Ledger:
    """The file ``ledger.sqlite`` of a study; made where ``write`` is asked for and it is not there."""

    def __init__(self, study: Path, write: bool = False) -> None:
        self.path = study / FILE
        self.write = write
        if not write and not self.path.is_file():
            raise UserError(f"{study} is no study: it has no {FILE}", "name the study_dir of a `c2g sweep`")
        with self._open() as connection:
            if write:
                connection.executescript(SCHEMA)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction."""
        try:
            mode = "rwc" if self.write else "ro"
            with closing(
                sqlite3.connect(f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)
            ) as connection:
                if self.write:
                    connection.execute("pragma journal_mode=delete")
                    connection.execute("pragma synchronous=full")
                with connection:
                    yield connection
        except sqlite3.Error as error:
            raise UserError(
                f"the ledger {self.path} cannot be used: {error}",
                "make room, or remove the file: the next `c2g sweep` builds it again from the runs",
            ) from error

    def rows(self) -> list[Row]:
        """All tasks, in the order of stages and of the grid."""
        with self._open() as connection:
            found = connection.execute(f"select {','.join(COLUMNS)} from tasks order by position").fetchall()
        named = [dict(zip(COLUMNS, values, strict=True)) for values in found]
        return [
            Row(**{**row, "upstream": tuple(json.loads(row["upstream"])), "alarms": tuple(row["alarms"].split())})
            for row in named
        ]

    def add(self, tasks: Iterable[Task], allowed: int) -> None:
        """Enter tasks that are not there yet; what is known of the others stays, but for ``allowed``, which only grows."""
        with self._open() as connection:
            known = connection.execute("select coalesce(max(position), 0) from tasks").fetchone()[0]
            values = [
                (t.id, t.stage, t.folder, t.label, json.dumps(t.upstream), t.nodes, t.tasks_per_node, allowed)
                for t in sorted(tasks, key=lambda t: STAGES.index(t.stage))
            ]
            connection.executemany(
                "insert into tasks (id, stage, folder, label, upstream, nodes, tasks_per_node, allowed, position)"
                f" values (?,?,?,?,?,?,?,?,{known} + ?) on conflict (id) do update set label = excluded.label,"
                " folder = excluded.folder, allowed = max(allowed, excluded.allowed)",
                [(*v, i) for i, v in enumerate(values, 1)],
            )

    def report(self, reports: Iterable[Report]) -> None:
        """Take over what tasks told of themselves."""
        with self._open() as connection:
            connection.executemany(
                "update tasks set state = ?, attempts = ?, failures = ?, cause = ?, job = ?, seconds = ?,"
                " alarms = ? where id = ?",
                [
                    (
                        *(r.state, r.attempts, r.failures, r.cause, r.job),
                        r.ended - r.began if r.ended else None,
                        " ".join(r.alarms),
                        r.id,
                    )
                    for r in reports
                ],
            )

    def assign(self, task: str, job: str) -> None:
        """Note the job that a task is handed to, outside of any submission."""
        with self._open() as connection:
            connection.execute("update tasks set job = ?, submission = '' where id = ?", (job, task))

    def allow(self, ids: Iterable[str], more: int) -> None:
        """Let tasks fail ``more`` times from now on."""
        with self._open() as connection:
            connection.executemany("update tasks set allowed = failures + ? where id = ?", [(more, i) for i in ids])

    def intend(self, submission: Submission, cluster: str) -> None:
        """Note that a submission is about to be made: before the scheduler hears of it."""
        with self._open() as connection:
            connection.execute(
                "insert or replace into submissions (token, name, stage, job, cluster) values (?,?,?,null,?)",
                (submission.token, submission.name, submission.stage, cluster),
            )
            connection.executemany(
                "update tasks set submission = ?, job = '' where id = ?",
                [(submission.token, e.id) for e in submission.elements],
            )

    def submitted(self, submission: Submission, job: str) -> None:
        """Note the job that a submission became, and each task's element."""
        several = len(submission.elements) > 1
        with self._open() as connection:
            connection.execute("update submissions set job = ? where token = ?", (job, submission.token))
            connection.executemany(
                "update tasks set job = ? where id = ? and submission = ?",
                [(f"{job}_{i}" if several else job, e.id, submission.token) for i, e in enumerate(submission.elements)],
            )

    def adopt(self, submission: Submission, cluster: str, job: str) -> None:
        """Enter a submission of before the ledger was built anew."""
        self.intend(submission, cluster)
        self.submitted(submission, job)

    def withdraw(self, submission: Submission) -> None:
        """Forget a submission that the scheduler never got."""
        with self._open() as connection:
            connection.execute("delete from submissions where token = ?", (submission.token,))
            connection.execute("update tasks set submission = '', job = '' where submission = ?", (submission.token,))

    def unknown_submissions(self) -> list[tuple[str, str]]:
        """(token, job name) of submissions whose launcher ended before it learned their job."""
        with self._open() as connection:
            return connection.execute("select token, name from submissions where job is null").fetchall()
