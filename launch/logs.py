"""``c2g logs RUN``: what a run of a study printed, its last attempt last."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from hpc_c2g.errors import UserError
from hpc_c2g.studies.config import STAGES
from hpc_c2g.studies.find import chosen, study_of
from hpc_c2g.studies.ledger import Ledger
from hpc_c2g.studies.local_executor import LOGS
from hpc_c2g.studies.reports import read_report
from hpc_c2g.studies.submissions import FOLDER
from hpc_c2g.studies.view import View, look
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors


@dataclass
class LogsConfig:
    """Of which run, and how much.

    Attributes:
        run: its id, the beginning of it, or its folder.
        study_dir: of the study; not needed with the run's folder.
        stage: only this one's.
        lines: last lines of each file; 0 prints all.
        paths: print the files' names alone.
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


def log_files(study: Path, view: View) -> list[Path]:
    """Files that the task's attempts printed into, the last attempt's last; errors after output."""
    report = read_report(study, view.row)
    jobs = [h["job"] for h in report.history] + [report.job] if report else []
    jobs = list(dict.fromkeys([*jobs, view.row.job]))
    found: list[Path] = []
    for job in filter(None, jobs):
        found += [f for ending in ("out", "err") if (f := study / LOGS / f"{job}.{ending}").exists()]
        found += sorted(study.glob(f"{FOLDER}/*/{job}_*_log.*"), key=lambda f: (f.suffix != ".out", f.name))
    return found


def logs(config: LogsConfig) -> None:
    """Print them."""
    study, name = (Path(config.study_dir), config.run) if config.study_dir else study_of(config.run)
    views = chosen(look(study, Ledger(study).rows(), None), [name])
    console, shown = Console(), 0
    for view in views:
        if config.stage and view.row.stage != config.stage:
            continue
        if view.reason and not config.paths:
            console.print(f"{view.row.stage} {view.row.id}: {view.state}: {view.reason}", markup=False, highlight=False)
        for file in log_files(study, view):
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
    """Entry point."""
    with user_errors("logs"):
        overrides = as_overrides(sys.argv[1:], LogsConfig, ["run"])
    run_verb("logs", LogsConfig, logs, overrides=overrides)


if __name__ == "__main__":
    main()
