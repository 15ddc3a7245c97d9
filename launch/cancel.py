"""``c2g cancel DIR [RUN ...]``: stop a study's tasks; those that run save first, and the same sweep resumes them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from hpc_c2g.files import write_atomically
from hpc_c2g.scheduling.queue import Queue
from hpc_c2g.studies.epilog import cancel_mark
from hpc_c2g.studies.local_executor import stop_local
from hpc_c2g.studies.select_tasks import select_tasks
from hpc_c2g.studies.study import read_study
from hpc_c2g.studies.task_status import ACTIVE, read_statuses
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors


@dataclass
class CancelConfig:
    """Tasks to stop.

    Attributes:
        study_dir: Folder of the study.
        run: Ids, beginnings of ids, or folders; default: all tasks.
    """

    study_dir: str = "???"
    run: list[str] = field(default_factory=list)


def cancel(config: CancelConfig) -> None:
    """Mark the tasks first, so that no job that ends requeues itself; then stop them."""
    study = Path(config.study_dir)
    cluster = read_study(study).cluster
    here = cluster in ("local", "debug")
    queue = None if here else Queue()
    selected = select_tasks(read_statuses(study, queue.query() if queue else None), config.run)
    selected = [s for s in selected if s.state in ACTIVE or (here and s.state in ("new", "interrupted"))]
    for status in selected:
        write_atomically(cancel_mark(study, status.task), b"")
    if queue:
        queue.cancel([s.job for s in selected])
    else:
        stop_local(study, selected)
    print(f"cancelled: {len(selected)} tasks; the same `c2g sweep` resumes them")


def main() -> None:
    """Run the verb."""
    with user_errors("cancel"):
        overrides = as_overrides(sys.argv[1:], CancelConfig, ["study_dir", "run"])
    run_verb("cancel", CancelConfig, cancel, overrides=overrides)


if __name__ == "__main__":
    main()
