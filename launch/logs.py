"""``c2g logs RUN``: print the logs of a study's run, those of its last attempt last."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from hpc_c2g.errors import UserError
from hpc_c2g.studies.config import STAGES
from hpc_c2g.studies.local_executor import LOGS
from hpc_c2g.studies.reports import read_report
from hpc_c2g.studies.select_tasks import select_tasks, split_run_folder
from hpc_c2g.studies.submissions import FOLDER
from hpc_c2g.studies.task_status import TaskStatus, read_statuses
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors


@dataclass
class LogsConfig:
    """A run, and the part of its logs to print.

    Attributes:
        run: Id of the run, the beginning of it, or its folder.
        study_dir: Folder of the study; not needed with the run's folder.
        stage: Stage whose logs are printed; default: all.
        lines: Number of last lines of each file; 0 prints all.
        paths: Print the names of the files only.
    """

    run: str = "???"
    study_dir: str = ""
    stage: str = ""
    lines: int = 40
    paths: bool = False

    def __post_init__(self) -> None:
        if self.lines < 0:
            raise UserError(f"lines={self.lines} is negative", "give lines >= 0, 0 for all")
        if self.stage and self.stage not in STAGES:
            raise UserError(f"stage={self.stage} is unknown", f"choose one of {', '.join(STAGES)}")


def log_files(study: Path, status: TaskStatus) -> list[Path]:
    """Return the log files of the task's attempts, the last attempt's last; errors after output."""
    report = read_report(study, status.task)
    jobs = [h["job"] for h in report.history] + [report.job] if report else []
    jobs = list(dict.fromkeys([*jobs, status.job]))
    found: list[Path] = []
    for job in filter(None, jobs):
        found += [f for ending in ("out", "err") if (f := study / LOGS / f"{job}.{ending}").exists()]
        found += sorted(study.glob(f"{FOLDER}/*/{job}_*_log.*"), key=lambda f: (f.suffix != ".out", f.name))
    return found


def logs(config: LogsConfig) -> None:
    """Print the logs."""
    study, name = (Path(config.study_dir), config.run) if config.study_dir else split_run_folder(config.run)
    console, shown = Console(), 0
    for status in select_tasks(read_statuses(study, None), [name]):
        task = status.task
        if config.stage and task.stage != config.stage:
            continue
        if status.reason and not config.paths:
            console.print(f"{task.stage} {task.id}: {status.state}: {status.reason}", markup=False, highlight=False)
        for file in log_files(study, status):
            shown += 1
            if config.paths:
                print(file)
                continue
            lines = file.read_text(errors="replace").splitlines()
            if lines:
                console.print(Rule(str(file), align="left"))
                print("\n".join(lines[-config.lines :]))
    if not shown:
        print(f"{name} has printed nothing yet", file=sys.stderr)


def main() -> None:
    """Run the verb."""
    with user_errors("logs"):
        overrides = as_overrides(sys.argv[1:], LogsConfig, ["run"])
    run_verb("logs", LogsConfig, logs, overrides=overrides)


if __name__ == "__main__":
    main()
