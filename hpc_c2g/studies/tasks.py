"""A study's tasks: one stage of one run each, with what it builds on. A task that several runs need is there once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically
from hpc_c2g.studies.config import STAGES

FOLDERS = {"classifier": "classifiers", "certify": "classifiers", "train": "runs", "evaluate": "runs", "bound": "runs"}
"""Where a stage's results lie; one that works on another's results lies with them."""


@dataclass(frozen=True)
class Task:
    """One stage of one run.

    Attributes:
        id: its identity.
        stage: one of ``STAGES``.
        folder: of its results, below the study's.
        config: resolved settings of its verb, without the study's own paths.
        upstream: ids of the tasks whose results it takes.
        inputs: their folders, below the study's, in the same order.
        points: of the grid, that lead to it.
        nodes: it runs on.
        tasks_per_node: processes on each.
        code: version of its code.
        overrides: of its verb, that make these settings.
    """

    id: str
    stage: str
    folder: str
    config: dict[str, Any]
    upstream: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    points: tuple[dict[str, str], ...] = field(default=())
    nodes: int = 1
    tasks_per_node: int = 1
    code: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.nodes * self.tasks_per_node

    @property
    def label(self) -> str:
        """What people call it: the fields that set it apart."""
        point = self.points[0] if len(self.points) == 1 else _common(self.points)
        return " ".join(f"{k}={v}" for k, v in point.items())


class Placed(Protocol):
    """What has a place among the study's results: a task, or its row in the ledger."""

    @property
    def id(self) -> str:
        """Of the task."""

    @property
    def stage(self) -> str:
        """Its stage."""

    @property
    def folder(self) -> str:
        """Of its results, below the study's."""


def spec_name(task: Placed) -> str:
    """The file of a task's description, below the study's folder."""
    return f"{task.folder}/{task.stage}.task.json"


def _common(points: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What all points agree in."""
    points = list(points)
    return {k: v for k, v in (points[0] if points else {}).items() if all(p.get(k) == v for p in points)}


def spec_file(study: Path, task: Task) -> Path:
    """Where a task's description lies: in the folder of its results."""
    return study / spec_name(task)


def write_spec(study: Path, task: Task) -> None:
    """Describe the task in its folder, if that does not stand there already.

    Raises:
        UserError: the folder cannot be written.
    """
    file, content = spec_file(study, task), json.dumps(asdict(task), indent=1).encode()
    if not file.is_file() or file.read_bytes() != content:
        write_atomically(file, content)


def read_spec(file: Path) -> Task:
    """A task from its description.

    Raises:
        UserError: no such file, or it is damaged.
    """
    try:
        values = json.loads(file.read_text())
        for name in ("upstream", "inputs", "points"):
            values[name] = tuple(values[name])
        values["overrides"] = tuple(values.get("overrides", ()))  # of a study of before there were any
        return Task(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} describes no task: {error}", "run the `c2g sweep` of the study again") from error


def find_specs(study: Path) -> list[Task]:
    """All tasks that the study's folders describe, in the order of stages; damaged descriptions are left out."""
    tasks = []
    for folder in dict.fromkeys(FOLDERS.values()):
        for file in sorted(study.glob(f"{folder}/*/*.task.json")):
            try:
                tasks.append(read_spec(file))
            except UserError:
                continue
    return sorted(tasks, key=lambda task: STAGES.index(task.stage))
