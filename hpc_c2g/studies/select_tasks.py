"""Selection of tasks by id, by the beginning of an id, or by their folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.studies.task_status import TaskStatus


def select_tasks(statuses: Sequence[TaskStatus], names: Sequence[str]) -> list[TaskStatus]:
    """Return the tasks that ``names`` select, all of them without names.

    Args:
        statuses: Tasks of the study.
        names: Ids, beginnings of ids, or folders; a run's folder selects all stages in it.

    Raises:
        UserError: A name selects nothing, or tasks of several folders.
    """
    if not names:
        return list(statuses)
    found: list[TaskStatus] = []
    for name in names:
        word = Path(name).name if "/" in name else name
        hits = [s for s in statuses if any(n.startswith(word) for n in _names(s))] if word else []
        exact = [s for s in hits if word in _names(s)]
        folders = {s.task.folder for s in exact or hits}
        if not hits:
            raise UserError(f"{name!r} is no run of the study", "see `c2g status DIR --all` for their ids")
        if len(folders) > 1:
            raise UserError(f"{name!r} means {len(folders)} runs", "write more of the id")
        found += [s for s in exact or hits if s not in found]
    return found


def _names(status: TaskStatus) -> tuple[str, str]:
    return status.task.id, Path(status.task.folder).name


def split_run_folder(run: str) -> tuple[Path, str]:
    """Return (folder of the study, name of the run) for a run's folder such as ``DIR/runs/3fa2``.

    Raises:
        UserError: The folder is in no study.
    """
    path = Path(run)
    for above in (path.parent.parent, *path.resolve().parents):
        if (above / "study.yaml").is_file():
            return above, path.name
    raise UserError(f"{run} is in no study", "name the study too: c2g logs RUN study_dir=DIR")
