"""What a study is: the settings that its runs share, the variants they come in, and the grid that is swept."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hpc_c2g.errors import UserError

STAGES = ("classifier", "certify", "train", "evaluate", "bound")
"""In the order in which they run; each but the first builds on results of an earlier one."""
NEEDS = {"classifier": None, "certify": "classifier", "train": "classifier", "evaluate": "train", "bound": "train"}
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"


@dataclass
class Variant:
    """One way in which a study's runs may differ that no grid of single fields can say.

    Attributes:
        classifiers: of one generator, each as overrides of ``c2g classifier``; empty: one, as the study says.
        classifier: overrides for each of them.
        train: overrides of ``c2g train``.
        evaluate: overrides of ``c2g evaluate``.
        nodes: of training; None: as the study says.
        tasks_per_node: processes on each; None: as the study says.
    """

    classifiers: list[list[str]] = field(default_factory=list)
    classifier: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    nodes: int | None = None
    tasks_per_node: int | None = None


@dataclass
class StudyConfig:
    """A study.

    Attributes:
        name: goes into the names of its jobs.
        about: the question that it answers, in a line.
        stages: those of ``STAGES`` that it has.
        classifier: overrides of ``c2g classifier`` that all runs share; likewise the next four.
        certify: of ``c2g certify``.
        train: of ``c2g train``.
        evaluate: of ``c2g evaluate``.
        bound: of ``c2g bound``.
        variants: by name; the grid chooses among them as ``variant``.
        grid: values by field, in Hydra's syntax for sweeps; a field belongs to every stage that has it, ``train.seed`` to that stage.
        nodes: of a training run.
        tasks_per_node: processes of a training run on each node.
    """

    name: str = "???"
    about: str = ""
    stages: list[str] = field(default_factory=lambda: ["classifier", "certify", "train", "evaluate"])
    classifier: list[str] = field(default_factory=list)
    certify: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    bound: list[str] = field(default_factory=list)
    variants: dict[str, Variant] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    nodes: int = 1
    tasks_per_node: int = 1

    def __post_init__(self) -> None:
        if self.name != "???" and not re.fullmatch(NAME, self.name):
            raise UserError(f"study.name={self.name!r} cannot name a job", "use letters, digits, dots and dashes")
        for stage in self.stages:
            if stage not in STAGES:
                raise UserError(f"study.stages names {stage!r}", f"choose from {', '.join(STAGES)}")
            needed = NEEDS[stage]
            if needed and needed not in self.stages:
                raise UserError(f"study.stages={self.stages} has {stage} without {needed}", f"add {needed}")
        if len(set(self.stages)) < len(self.stages) or not self.stages:
            raise UserError(f"study.stages={self.stages} is no set of stages", "name each once")
        self.stages = [stage for stage in STAGES if stage in self.stages]
        for name in ("nodes", "tasks_per_node"):
            if getattr(self, name) < 1:
                raise UserError(f"study.{name}={getattr(self, name)} is too small", f"give {name} >= 1")
