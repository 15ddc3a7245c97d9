"""``c2g doctor``: what would stop a study on this cluster, before it does. Imports no torch: it must answer at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

import hpc_c2g
from hpc_c2g.errors import UserError
from hpc_c2g.preflight.check_result import CheckResult
from hpc_c2g.preflight.cluster import check_slurm
from hpc_c2g.preflight.host import check_host
from hpc_c2g.preflight.study_folder import check_mount, check_study_folder
from hpc_c2g.scheduling.batch_script import Shape
from hpc_c2g.scheduling.profile import SlurmProfile
from launch._compose.arguments import as_overrides, split_grid
from launch._compose.cli import run_verb, user_errors
from launch._compose.cluster import Where, profile_of

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red", "unknown": "dim"}


@dataclass
class DoctorConfig:
    """What to look at.

    Attributes:
        study_dir: the study's folder, or one beside which studies will be.
        cluster: where the study will run.
        job: also look at nodes, by a small job.
        nodes: of a run, and of that job.
        tasks_per_node: ranks on each.
        wait: seconds within which that job must start.
        json: a machine-readable answer.
    """

    study_dir: str = "."
    cluster: Where = field(default_factory=Where)
    job: bool = False
    nodes: int = 1
    tasks_per_node: int = 1
    wait: float = 300.0
    json: bool = False

    def __post_init__(self) -> None:
        Shape(self.nodes, self.tasks_per_node)
        if not self.wait > 0:
            raise UserError(f"wait={self.wait} is no time", "give seconds > 0")


def run_checks(config: DoctorConfig) -> list[CheckResult]:
    """All findings."""
    folder, profile = Path(os.path.abspath(config.study_dir)), profile_of(config.cluster)
    if profile is None:
        if config.job:
            raise UserError(f"--job is set, but cluster={config.cluster.name} sends no jobs", "add cluster=PROFILE")
        return check_host() + check_study_folder(folder, slurm=False)
    shape = Shape(config.nodes, config.tasks_per_node)
    there = check_study_folder(folder, slurm=True)
    asked, startable = check_slurm(profile, shape, folder)
    found = [*asked, *there]
    told: list[CheckResult] = []
    if config.job and startable and not any(f.status == "error" for f in there):
        told = _told_by_nodes(profile, shape, folder, config.wait)
    if not any(f.status == "ok" for f in told):  # no node has told whether it sees the files
        if not any(f.status == "error" for f in there):
            found.append(check_mount(f"study_dir={folder}", folder))
        if not profile.container:
            found.append(check_mount("the package", Path(hpc_c2g.__file__).parent))
    return found + told


def _told_by_nodes(profile: SlurmProfile, shape: Shape, folder: Path, wait: float) -> list[CheckResult]:
    from hpc_c2g.preflight.node_job import check_nodes

    signal.signal(signal.SIGTERM, _end)
    try:
        with Status("", console=Console(stderr=True)) as line:
            return check_nodes(profile, shape, folder, wait, line.update)
    except UserError as error:
        return [
            CheckResult("error", error.problem, error.hint.replace("see `c2g doctor`", "correct profile.FIELD=VALUE"))
        ]


def _end(number: int, frame: FrameType | None) -> None:
    """So that the job is cancelled first; a second signal must not interrupt that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def doctor(config: DoctorConfig) -> None:
    """Look, show, and end with 1 where something is wrong."""
    found = run_checks(config)
    errors = sum(f.status == "error" for f in found)
    if config.json:
        print(json.dumps({"errors": errors, "findings": [asdict(f) for f in found]}, indent=1))
    else:
        show(found)
    if errors:
        sys.exit(1)


def show(found: Sequence[CheckResult]) -> None:
    """A table for people; a plain line per finding for programs."""
    if not sys.stdout.isatty():
        for finding in found:
            print(f"{finding.status:<8} {finding.message}{' -- ' if finding.hint else ''}{finding.hint}")
        return
    out = Table(box=None, pad_edge=False)
    for column in ("", "finding", "hint"):
        out.add_column(column)
    for finding in found:
        out.add_row(Text(finding.status, style=STYLES[finding.status]), Text(finding.message), Text(finding.hint))
    Console().print(out)


def main() -> None:
    """Entry point."""
    with user_errors("doctor"):
        own, others = split_grid(as_overrides(sys.argv[1:], DoctorConfig, ["study_dir"]), DoctorConfig)
    run_verb("doctor", DoctorConfig, doctor, overrides=[*others, *own])  # flags last


if __name__ == "__main__":
    main()
