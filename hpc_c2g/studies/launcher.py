"""The launcher: the one process at a time that hands out a study's tasks and writes its journal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.lease import Lease
from hpc_c2g.scheduling.queue import Entry
from hpc_c2g.studies.config import STAGES
from hpc_c2g.studies.epilog import cancel_mark
from hpc_c2g.studies.journal import open_journal
from hpc_c2g.studies.task_status import ACTIVE, TaskStatus, task_statuses
from hpc_c2g.studies.tasks import TaskInfo

HOLD_SECONDS = 20.0
"""Seconds that a launcher waits for another that is about to end."""


@contextlib.contextmanager
def launching(study: Path, wait: float = HOLD_SECONDS) -> Iterator[None]:
    """Hold the study's lease: within the context, this process is its launcher.

    Raises:
        UserError: Another launcher holds it (the error names it), or the folder cannot be written.
    """
    with Lease(study).acquire(wait):
        yield


class Launcher:
    """A study whose lease this process holds, and the tasks of it that may be handed out.

    Args:
        study: Folder of the study.
        retries: Number of failures after which a task is still tried again.
    """

    def __init__(self, study: Path, retries: int) -> None:
        self.study, self.retries = study, retries
        self.journal = open_journal(study)
        self._done: dict[str, TaskStatus] = {}

    def statuses(self, queue: Mapping[str, Entry] | None) -> list[TaskStatus]:
        """Return the status of every task; ``queue`` as in ``read_statuses``."""
        found = task_statuses(self.study, self.journal, self.retries, queue, self._done)
        self._done.update((s.task.id, s) for s in found if s.state == "done")
        return found

    def runnable(self, statuses: Sequence[TaskStatus], only: str = "") -> list[TaskStatus]:
        """Return the tasks to hand out, by stage: not done, not active, not given up, and depending on nothing given up.

        Args:
            statuses: Status of every task.
            only: ``failed`` leaves out what did not fail, unless it depends on a task that did.
        """
        chosen: list[TaskStatus] = []
        ids: set[str] = set()
        under_way = {s.task.id for s in statuses if s.state in ("done", *ACTIVE)}
        for status in sorted(statuses, key=lambda s: STAGES.index(s.task.stage)):
            if status.task.id in under_way or status.given_up:
                continue
            upstream = status.task.upstream
            stuck = status.state == "blocked" and not all(u in ids or u in under_way for u in upstream)
            left_out = only == "failed" and not (
                any(u in ids for u in upstream) or status.state in ("failed", "blocked", "lost")
            )
            if not stuck and not left_out:
                chosen.append(status)
                ids.add(status.task.id)
        return chosen

    def ready(self, status: TaskStatus, by_id: Mapping[str, TaskStatus]) -> bool:
        """Return True if all tasks that it depends on are done."""
        return all(u in by_id and by_id[u].state == "done" for u in status.task.upstream)

    def max_failures(self, task: TaskInfo) -> int:
        """Return the number of failures after which the task is still tried again."""
        return self.journal.limit_of(task.id, self.retries)

    def reset_failures(self, statuses: Sequence[TaskStatus]) -> None:
        """Allow tasks that were given up ``retries`` more failures."""
        self.journal.set_max_failures({s.task.id: s.failures + self.retries for s in statuses if s.given_up})

    def clear_cancel_marks(self, statuses: Sequence[TaskStatus]) -> None:
        """Remove the cancel marks of tasks that are about to be handed out.

        Raises:
            UserError: A mark cannot be removed.
        """
        for status in statuses:
            mark = cancel_mark(self.study, status.task)
            try:
                mark.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{mark} cannot be removed: {error.strerror}", "remove it by hand") from error
