"""Definition of a study: the settings that its runs share, their variants, and the grid."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hpc_c2g.errors import UserError

STAGES = ("classifier", "certify", "train", "evaluate", "bound")
"""Stages in the order in which they run; each but the first takes results of an earlier one."""
NEEDS = {"classifier": None, "certify": "classifier", "train": "classifier", "evaluate": "train", "bound": "train"}
"""Stage whose results a stage takes."""
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"


@dataclass
class Variant:
    """Settings of a run that no grid of single fields can express, chosen in the grid by name.

    Attributes:
        classifiers: Classifiers of one generator, each as overrides of ``c2g classifier``; empty: one, as the study defines it.
        classifier: Overrides of ``c2g classifier`` for each of them.
        train: Overrides of ``c2g train``.
        evaluate: Overrides of ``c2g evaluate``.
        nodes: Number of nodes of training; None: as the study defines it.
        tasks_per_node: Number of processes on each node; None: as the study defines it.
    """

    classifiers: list[list[str]] = field(default_factory=list)
    classifier: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)
    nodes: int | None = None
    tasks_per_node: int | None = None


@dataclass
class StudyConfig:
    """A study: many runs that differ by a grid of settings.

    Attributes:
        name: Name of the study, part of the names of its jobs.
        about: Question that the study answers, in one line.
        stages: Stages that each point of the grid goes through.
        classifier: Overrides of ``c2g classifier`` that all runs share.
        certify: Overrides of ``c2g certify`` that all runs share.
        train: Overrides of ``c2g train`` that all runs share.
        evaluate: Overrides of ``c2g evaluate`` that all runs share.
        bound: Overrides of ``c2g bound`` that all runs share.
        variants: Variants by name; the grid chooses among them as ``variant``.
        grid: Values by field, in Hydra's syntax for sweeps; a field applies to every stage that has it, ``train.seed`` to that stage.
        nodes: Number of nodes of a training run.
        tasks_per_node: Number of processes of a training run on each node.
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
