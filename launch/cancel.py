"""``c2g cancel DIR [RUN ...]``: stop a study's tasks; what is at work saves first, and the same sweep goes on from there."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hpc_c2g.files import write_atomically
from hpc_c2g.scheduling.queue import Queue
from hpc_c2g.studies.epilog import cancel_mark
from hpc_c2g.studies.find import chosen
from hpc_c2g.studies.ledger import Ledger
from hpc_c2g.studies.local_executor import stop_local
from hpc_c2g.studies.study import read_study
from hpc_c2g.studies.view import ACTIVE, look
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors


@dataclass
class CancelConfig:
    """What to stop.

    Attributes:
        study_dir: of the study.
        run: ids, beginnings of ids, or folders; none: everything.
    """

    study_dir: str = "???"
    run: list[str] = field(default_factory=list)


def cancel(config: CancelConfig) -> None:
    """Mark first, so that nothing puts a job that ends back into the queue; then stop."""
    study = Path(config.study_dir)
    cluster = read_study(study).cluster
    here = cluster in ("local", "debug")
    queue = None if here else Queue()
    views = chosen(look(study, Ledger(study).rows(), queue.ask() if queue else None), config.run)
    views = [v for v in views if v.state in ACTIVE or (here and v.state in ("new", "interrupted"))]
    for view in views:
        write_atomically(cancel_mark(study, view.row), b"")
    if queue:
        queue.cancel([v.row.job for v in views])
    else:
        stop_local(study, views)
    print(f"cancelled: {len(views)} tasks; the same `c2g sweep` goes on with them")


def main() -> None:
    """Entry point."""
    with user_errors("cancel"):
        overrides = as_overrides(sys.argv[1:], CancelConfig, ["study_dir", "run"])
    run_verb("cancel", CancelConfig, cancel, overrides=overrides)


if __name__ == "__main__":
    main()
