"""The launcher: the one process at a time that hands out a study's tasks and writes its ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.lease import Lease
from hpc_c2g.scheduling.queue import Entry
from hpc_c2g.studies.config import STAGES
from hpc_c2g.studies.epilog import cancel_mark
from hpc_c2g.studies.ledger import Ledger, Row
from hpc_c2g.studies.reports import read_report
from hpc_c2g.studies.tasks import Task
from hpc_c2g.studies.view import ACTIVE, View, look

HOLD_SECONDS = 20.0
"""How long a launcher waits for another that is about to end."""


@contextlib.contextmanager
def launching(study: Path, wait: float = HOLD_SECONDS) -> Iterator[None]:
    """Hold the study: within, this process is its launcher.

    Raises:
        UserError: another launcher is at work (it is named), or the folder cannot be written.
    """
    with Lease(study).acquire(wait):
        yield


class Launcher:
    """A held study, its tasks, and what of them may be handed out.

    Args:
        study: its folder, which the caller holds (see ``launching``).
        ledger: of the study, writable.
        tasks: by id.
    """

    def __init__(self, study: Path, ledger: Ledger, tasks: Mapping[str, Task]) -> None:
        self.study, self.ledger, self.tasks = study, ledger, tasks
        self._absorb(self.ledger.rows())

    def look(self, queue: Mapping[str, Entry] | None) -> list[View]:
        """Where every task stands; what is new goes into the ledger."""
        views = look(self.study, self.ledger.rows(), queue)
        self.ledger.report(v.report for v in views if v.report and _is_news(v.row, v))
        return views

    def _absorb(self, rows: Sequence[Row]) -> None:
        """Take over reports of tasks that the ledger believes untouched: it may have been built anew."""
        found = []
        for row in rows:
            if row.state == "new":
                report = read_report(self.study, row)
                found += [report] if report else []
        self.ledger.report(found)

    def wanted(self, views: Sequence[View], only: str = "") -> list[View]:
        """Tasks that nobody works on and that are to be done, in the order of stages; a task without hope is not among them.

        Args:
            views: of all tasks.
            only: ``failed``: leave alone what did not fail, unless it builds on what did.
        """
        chosen: list[View] = []
        ids: set[str] = set()
        under_way = {v.row.id for v in views if v.state in ("done", *ACTIVE)}
        for view in sorted(views, key=lambda v: STAGES.index(v.row.stage)):
            if view.row.id not in self.tasks or view.state in ("done", *ACTIVE) or view.given_up:
                continue
            below = any(u in ids for u in view.row.upstream)
            stuck = view.state == "blocked" and not all(u in ids or u in under_way for u in view.row.upstream)
            if stuck or (only == "failed" and not (below or view.state in ("failed", "blocked", "lost"))):
                continue
            chosen.append(view)
            ids.add(view.row.id)
        return chosen

    def forgive(self, views: Sequence[View], retries: int) -> None:
        """Give tasks that were given up another chance."""
        self.ledger.allow([v.row.id for v in views if v.given_up], retries)

    def clear_marks(self, views: Sequence[View]) -> None:
        """Tasks that are handed out again are no longer cancelled.

        Raises:
            UserError: a mark cannot be removed.
        """
        for view in views:
            mark = cancel_mark(self.study, self.tasks[view.row.id])
            try:
                mark.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{mark} cannot be removed: {error.strerror}", "remove it by hand") from error

    def ready(self, view: View, views: Mapping[str, View]) -> bool:
        """Whether all that the task builds on is done."""
        return all(views[u].state == "done" for u in view.row.upstream)


def _is_news(row: Row, view: View) -> bool:
    report = view.report
    if report is None:
        return False
    return (row.state, row.attempts, row.failures) != (report.state, report.attempts, report.failures)
