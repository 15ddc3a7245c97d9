"""A study's folder: ``study.yaml`` (its definition), ``journal.jsonl`` (its submissions), and a folder per classifier and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically
from hpc_c2g.settings import from_plain, read_plain
from hpc_c2g.studies.config import StudyConfig
from hpc_c2g.studies.journal import open_journal
from hpc_c2g.studies.results_version import RESULTS_VERSION
from hpc_c2g.studies.tasks import Task, write_spec

FILE = "study.yaml"


@dataclass
class StudyFile:
    """Content of ``study.yaml``.

    Attributes:
        study: The study's definition.
        grids: Overrides of the grid, one list per command that added runs.
        cluster: Cluster of the last sweep.
        profile: Overrides of the cluster's profile.
        parallel: Number of tasks at once; None leaves it to the cluster.
        retries: Number of failures after which a task is still tried again. It only grows.
        results_versions: ``RESULTS_VERSION`` of each stage when the study began.
    """

    study: StudyConfig = field(default_factory=StudyConfig)
    grids: list[list[str]] = field(default_factory=list)
    cluster: str = "local"
    profile: dict[str, Any] = field(default_factory=dict)
    parallel: int | None = None
    retries: int = 2
    results_versions: dict[str, int] = field(default_factory=dict)


def read_study(folder: Path) -> StudyFile:
    """Read the study's definition.

    Raises:
        UserError: The folder holds no study, or the file is damaged.
    """
    absent, restore = f"study_dir={folder} is no study", "restore it, or choose another study_dir"
    values = read_plain(folder / FILE, absent, "begin one: `c2g sweep study=NAME`", restore)
    values.pop("code", None)  # of studies from before results had versions: readable, but not resumable
    return from_plain(StudyFile, values)


def check_results_versions(folder: Path, study: StudyFile) -> None:
    """Refuse a study whose results this code would not reproduce.

    Raises:
        UserError: A stage has another ``RESULTS_VERSION`` now.
    """
    for stage in study.study.stages:
        there, now = study.results_versions.get(stage), RESULTS_VERSION[stage]
        if there != now:
            was = "no version (it is older than versions)" if there is None else f"version {there}"
            raise UserError(
                f"study_dir={folder} has results of {stage} of {was}, this code makes version {now}:"
                " its runs would not be comparable",
                "choose another study_dir for a new sweep, or finish this one with the hpc_c2g that began it",
            )


def join_study(folder: Path, new: StudyFile, extend: bool) -> StudyFile:
    """Return ``new`` as it resumes in ``folder``: with the grids that the study has already.

    Raises:
        UserError: The folder holds another study, the grid is new without ``extend``, or a stage's results have another version.
    """
    if not (folder / FILE).exists():
        return replace(new, results_versions={stage: RESULTS_VERSION[stage] for stage in new.study.stages})
    old = read_study(folder)
    if asdict(old.study) != asdict(new.study):
        key = next(k for k, v in asdict(new.study).items() if asdict(old.study)[k] != v)
        raise UserError(
            f"study_dir={folder} holds another study: {key} is {getattr(old.study, key)} there, {getattr(new.study, key)} now",
            "choose another study_dir",
        )
    check_results_versions(folder, old)
    grids = [*old.grids, *(g for g in new.grids if g not in old.grids)]
    if len(grids) > len(old.grids) and not extend:
        raise UserError(
            f"study_dir={folder} has the grid {_summary(old.grids[-1])}, not {_summary(new.grids[0])}",
            "add these runs with --extend, or choose another study_dir",
        )
    retries = max(old.retries, new.retries)  # a task that may be tried again is not given up by a later command
    return replace(new, grids=grids, retries=retries, results_versions=old.results_versions)


def _summary(grid: Sequence[str]) -> str:
    return " ".join(grid) or "of its settings alone"


def save_study(folder: Path, study: StudyFile, tasks: Mapping[str, Task]) -> None:
    """Write ``study.yaml``, every task's description and the journal's list of tasks; the caller holds the study's lease.

    Raises:
        UserError: A file cannot be written.
    """
    write_atomically(folder / FILE, OmegaConf.to_yaml(OmegaConf.create(asdict(study))).encode())
    for task in tasks.values():
        write_spec(folder, task)
    open_journal(folder).plan(task.info for task in tasks.values())
