"""A study's tasks: one stage of one run each, with the tasks that it depends on. A task that several runs need exists once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically
from hpc_c2g.studies.config import STAGES

FOLDERS = {"classifier": "classifiers", "certify": "classifiers", "train": "runs", "evaluate": "runs", "bound": "runs"}
"""Folder of each stage's results; a stage that extends another's results writes into the same folder."""


@dataclass(frozen=True)
class TaskInfo:
    """A task without its settings: all that the launcher and readers of its state need.

    Attributes:
        id: Identity of the task, a hash (see ``task_id``).
        stage: One of ``STAGES``.
        folder: Folder of its results, relative to the study's.
        label: Fields of the grid that set the task apart, such as ``global_batch=50 seed=0``.
        upstream: Ids of the tasks whose results it takes.
        nodes: Number of nodes of its job.
        tasks_per_node: Number of processes on each node.
    """

    id: str
    stage: str
    folder: str
    label: str = ""
    upstream: tuple[str, ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1

    @property
    def ranks(self) -> int:
        """Number of processes of its job."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Task:
    """One stage of one run with its settings, as its file ``STAGE.task.json`` describes it.

    Attributes:
        id: Identity of the task, a hash (see ``task_id``).
        stage: One of ``STAGES``.
        folder: Folder of its results, relative to the study's.
        config: Resolved settings of its verb, without the study's own paths.
        upstream: Ids of the tasks whose results it takes.
        inputs: Folders of those results, relative to the study's, in the same order.
        points: Points of the grid that need this task.
        nodes: Number of nodes of its job.
        tasks_per_node: Number of processes on each node.
        results_version: The stage's ``RESULTS_VERSION`` when the study began.
        overrides: Overrides of the verb that compose ``config``.
    """

    id: str
    stage: str
    folder: str
    config: dict[str, Any]
    upstream: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    points: tuple[dict[str, str], ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1
    results_version: int = 0
    overrides: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Number of processes of its job."""
        return self.nodes * self.tasks_per_node

    @property
    def label(self) -> str:
        """Fields of the grid that set the task apart, such as ``global_batch=50 seed=0``."""
        point = self.points[0] if len(self.points) == 1 else _common(self.points)
        return " ".join(f"{k}={v}" for k, v in point.items())

    @property
    def info(self) -> TaskInfo:
        """The task without its settings."""
        return TaskInfo(self.id, self.stage, self.folder, self.label, self.upstream, self.nodes, self.tasks_per_node)


def _common(points: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the values that all points share."""
    points = list(points)
    return {k: v for k, v in (points[0] if points else {}).items() if all(p.get(k) == v for p in points)}


def spec_name(task: Task | TaskInfo) -> str:
    """Return the path of a task's description, relative to the study's folder."""
    return f"{task.folder}/{task.stage}.task.json"


def spec_file(study: Path, task: Task) -> Path:
    """Return the path of a task's description."""
    return study / spec_name(task)


def write_spec(study: Path, task: Task) -> None:
    """Write the task's description into its folder; a file with the same content is left untouched.

    Raises:
        UserError: The folder cannot be written.
    """
    file, content = spec_file(study, task), json.dumps(asdict(task), indent=1).encode()
    if not file.is_file() or file.read_bytes() != content:
        write_atomically(file, content)


_FIELDS = frozenset(f.name for f in fields(Task))
_TUPLES = ("upstream", "inputs", "points", "overrides")


def read_spec(file: Path) -> Task:
    """Read a task from its description. Fields that this version does not know are ignored.

    Raises:
        UserError: The file does not exist, or is damaged.
    """
    try:
        values = {k: v for k, v in json.loads(file.read_bytes()).items() if k in _FIELDS}
        for name in _TUPLES:
            values[name] = tuple(values.get(name, ()))
        return Task(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not describe a task: {error}", "run the study's `c2g sweep` again") from error


def find_specs(study: Path) -> list[Task]:
    """Return all tasks that the study's folders describe, by stage and id; damaged descriptions are left out."""
    tasks = []
    for folder in dict.fromkeys(FOLDERS.values()):
        for file in study.glob(f"{folder}/*/*.task.json"):
            with contextlib.suppress(UserError):
                tasks.append(read_spec(file))
    return sorted(tasks, key=lambda task: (STAGES.index(task.stage), task.id))
