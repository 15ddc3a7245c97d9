"""A study's folder: ``study.yaml`` (what it is), ``ledger.sqlite`` (where it stands), and a folder per classifier and run."""

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
from hpc_c2g.studies.identity import code_version
from hpc_c2g.studies.ledger import Ledger
from hpc_c2g.studies.tasks import Task, find_specs, write_spec

FILE = "study.yaml"


@dataclass
class StudyFile:
    """What ``study.yaml`` holds.

    Attributes:
        study: the study itself.
        grids: overrides of the grid, one list per command that added runs.
        cluster: where it was submitted last.
        profile: settings laid over the cluster's profile.
        parallel: tasks at once; None leaves it to the cluster.
        retries: failures after which a task is tried again.
        code: version of each stage's code that the runs' identities hold.
    """

    study: StudyConfig = field(default_factory=StudyConfig)
    grids: list[list[str]] = field(default_factory=list)
    cluster: str = "local"
    profile: dict[str, Any] = field(default_factory=dict)
    parallel: int | None = None
    retries: int = 2
    code: dict[str, str] = field(default_factory=dict)


def read_study(folder: Path) -> StudyFile:
    """What the study in ``folder`` is.

    Raises:
        UserError: no study there, or its file is damaged.
    """
    absent, restore = f"study_dir={folder} is no study", "restore it, or choose another study_dir"
    return from_plain(StudyFile, read_plain(folder / FILE, absent, "begin one: `c2g sweep study=NAME`", restore))


def joined(folder: Path, new: StudyFile, extend: bool, accept_code: bool) -> StudyFile:
    """``new`` as it goes on in ``folder``: with the grids that are there already.

    Raises:
        UserError: another study is there, the grid is new and nobody asked to extend, or the code has changed.
    """
    code = {stage: code_version(stage) for stage in new.study.stages}
    if not (folder / FILE).exists():
        return replace(new, code=code)
    old = read_study(folder)
    if asdict(old.study) != asdict(new.study):
        key = next(k for k, v in asdict(new.study).items() if asdict(old.study)[k] != v)
        raise UserError(
            f"study_dir={folder} holds another study: {key} is {getattr(old.study, key)} there, {getattr(new.study, key)} now",
            "choose another study_dir",
        )
    changed = [stage for stage, version in code.items() if old.code.get(stage) != version]
    if changed and not accept_code:
        raise UserError(
            f"the code of {', '.join(changed)} has changed since study_dir={folder} began:"
            " its runs would no longer be comparable",
            "use the code of then, choose another study_dir, or go on all the same with accept_code=true",
        )
    grids = [*old.grids, *(g for g in new.grids if g not in old.grids)]
    if len(grids) > len(old.grids) and not extend:
        raise UserError(
            f"study_dir={folder} has the grid {_summary(old.grids[-1])}, not {_summary(new.grids[0])}",
            "add these runs with --extend, or choose another study_dir",
        )
    return replace(new, grids=grids, code=old.code)


def _summary(grid: Sequence[str]) -> str:
    return " ".join(grid) or "of its settings alone"


def save_study(folder: Path, study: StudyFile, tasks: Mapping[str, Task]) -> Ledger:
    """Write ``study.yaml``, every task's description and the ledger; the caller holds the study's lease.

    Raises:
        UserError: it cannot be written.
    """
    write_atomically(folder / FILE, OmegaConf.to_yaml(OmegaConf.create(asdict(study))).encode())
    for task in tasks.values():
        write_spec(folder, task)
    ledger = Ledger(folder, write=True)
    ledger.add(tasks.values(), study.retries)
    return ledger


def rebuilt(folder: Path, retries: int) -> Ledger:
    """The ledger of the folders alone, where its file was lost; reports are taken over at the next look."""
    ledger = Ledger(folder, write=True)
    ledger.add(find_specs(folder), retries)
    return ledger
