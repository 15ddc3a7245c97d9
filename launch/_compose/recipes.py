"""Recipes that repeat each run of a study without the study: the commands of its stages, as one would type them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hpc_c2g.reporting.page import Recipe
from hpc_c2g.studies.config import STAGES
from hpc_c2g.studies.tasks import Task, find_specs


def recipes(study: Path) -> list[Recipe]:
    """Return a recipe for each training run, or for each classifier if there are no training runs."""
    tasks = find_specs(study)
    by_id = {task.id: task for task in tasks}
    last = [t for t in tasks if t.stage == "train"] or [t for t in tasks if t.stage == "classifier"]
    made = []
    for task in last:
        chain = [by_id[u] for u in task.upstream if u in by_id] + [task]
        chain += [t for t in tasks if t.folder in {c.folder for c in chain} and t not in chain]
        chain.sort(key=lambda t: STAGES.index(t.stage))
        made.append(Recipe(task.id, task.label, [command(t) for t in chain]))
    return made


def command(task: Task) -> str:
    """Return the command that makes the task's results, with folders as in the study."""
    places = {
        "classifier": [f"out={task.folder}"],
        "certify": [f"classifier={task.folder}"],
        "train": [_several("classifier", task.inputs), f"run_dir={task.folder}"],
    }.get(task.stage, [f"run_dir={task.folder}"])
    words = ["c2g", task.stage, *task.overrides, *places]
    if task.ranks > 1:
        words = ["srun", f"--nodes={task.nodes}", f"--ntasks-per-node={task.tasks_per_node}", *words]
    return " ".join(shlex.quote(word) for word in words)


def _several(field: str, folders: Sequence[str]) -> str:
    return f"{field}={folders[0]}" if len(folders) == 1 else f"{field}=[{','.join(folders)}]"
