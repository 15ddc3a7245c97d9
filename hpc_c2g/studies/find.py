"""Naming runs: by id, by the beginning of an id, or by their folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.studies.view import View


def chosen(views: Sequence[View], names: Sequence[str]) -> list[View]:
    """The tasks that ``names`` mean: ids, beginnings of ids, or folders; a run's folder means all stages in it. All without names.

    Raises:
        UserError: a name that means nothing, or ids of several runs.
    """
    if not names:
        return list(views)
    found: list[View] = []
    for name in names:
        word = Path(name).name if "/" in name else name
        hits = (
            [v for v in views if v.row.id.startswith(word) or Path(v.row.folder).name.startswith(word)] if word else []
        )
        exact = [v for v in hits if word in (v.row.id, Path(v.row.folder).name)]
        folders = {v.row.folder for v in exact or hits}
        if not hits:
            raise UserError(f"{name!r} is no run of the study", "see `c2g status DIR --all` for their ids")
        if len(folders) > 1:
            raise UserError(f"{name!r} means {len(folders)} runs", "write more of the id")
        found += [v for v in exact or hits if v not in found]
    return found


def study_of(run: str) -> tuple[Path, str]:
    """(the study's folder, the run's name) of a run's folder such as ``DIR/runs/3fa2``.

    Raises:
        UserError: no study around it.
    """
    path = Path(run)
    for above in (path.parent.parent, *path.resolve().parents):
        if (above / "study.yaml").is_file():
            return above, path.name
    raise UserError(f"{run} is in no study", "name the study too: c2g logs RUN study_dir=DIR")
