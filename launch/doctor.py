"""``c2g doctor``: checks before a study starts. Imports no torch, so that it answers at once."""

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

from hpc_c2g.errors import UserError
from hpc_c2g.preflight.check_result import CheckResult, has_errors
from hpc_c2g.preflight.cluster import check_slurm
from hpc_c2g.preflight.host import check_host
from hpc_c2g.preflight.study_folder import check_study_folder
from hpc_c2g.scheduling.batch_script import Shape
from hpc_c2g.scheduling.profile import SlurmProfile
from launch._compose.arguments import as_overrides, split_grid
from launch._compose.cli import run_verb, user_errors
from launch._compose.cluster import Where, profile_of

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red", "unknown": "dim"}


@dataclass
class DoctorConfig:
    """Settings of the doctor.

    Attributes:
        study_dir: Study folder, or the folder in which studies will be.
        cluster: Cluster of the study, ``local`` or a profile.
        job: Also check the nodes, by a small job.
        nodes: Number of nodes of a run, and of that job.
        tasks_per_node: Ranks per node.
        wait: Seconds within which that job must start.
        json: Print the results as JSON.
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
            raise UserError(f"wait={self.wait} is not a time", "give seconds > 0")


def run_checks(config: DoctorConfig) -> list[CheckResult]:
    """Run all checks."""
    folder, profile = Path(os.path.abspath(config.study_dir)), profile_of(config.cluster)
    if profile is None:
        if config.job:
            raise UserError(f"--job is set, but cluster={config.cluster.name} sends no jobs", "add cluster=PROFILE")
        return check_host() + check_study_folder(folder, slurm=False)
    shape = Shape(config.nodes, config.tasks_per_node)
    folder_results = check_study_folder(folder, slurm=True)
    slurm_results, startable = check_slurm(profile, shape, folder)
    results = [*slurm_results, *folder_results]
    if config.job and startable and not has_errors(folder_results):
        return results + _check_nodes(profile, shape, folder, config.wait)
    if not has_errors(folder_results):
        message = f"study_dir={folder} and the package were checked on this machine alone"
        results.append(CheckResult("unknown", message, "c2g doctor --job checks that the nodes see them"))
    return results


def _check_nodes(profile: SlurmProfile, shape: Shape, folder: Path, wait: float) -> list[CheckResult]:
    from hpc_c2g.preflight.node_job import check_nodes_by_job

    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        with Status("", console=Console(stderr=True)) as line:
            return check_nodes_by_job(profile, shape, folder, wait, line.update)
    except UserError as error:
        return [
            CheckResult("error", error.problem, error.hint.replace("see `c2g doctor`", "correct profile.FIELD=VALUE"))
        ]


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Leave by SystemExit, so that the job is cancelled; a second signal must not interrupt that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def doctor(config: DoctorConfig) -> None:
    """Run the checks, print their results and exit with 1 if one is an error."""
    results = run_checks(config)
    errors = sum(result.status == "error" for result in results)
    if config.json:
        print(json.dumps({"errors": errors, "findings": [asdict(result) for result in results]}, indent=1))
    else:
        show(results)
    if errors:
        sys.exit(1)


def show(results: Sequence[CheckResult]) -> None:
    """Print a table on a terminal, else a plain line per result."""
    if not sys.stdout.isatty():
        for result in results:
            print(f"{result.status:<8} {result.message}{' -- ' if result.hint else ''}{result.hint}")
        return
    out = Table(box=None, pad_edge=False)
    for column in ("", "result", "hint"):
        out.add_column(column)
    for result in results:
        out.add_row(Text(result.status, style=STYLES[result.status]), Text(result.message), Text(result.hint))
    Console().print(out)


def main() -> None:
    """Run the verb."""
    with user_errors("doctor"):
        own, others = split_grid(as_overrides(sys.argv[1:], DoctorConfig, ["study_dir"]), DoctorConfig)
    run_verb("doctor", DoctorConfig, doctor, overrides=[*others, *own])  # flags last


if __name__ == "__main__":
    main()
