"""``c2g collect DIR``: a study's results as tables: results.md, results.csv and results.json in its folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpc_c2g.reporting.results import collect as gather
from hpc_c2g.reporting.results import shown
from hpc_c2g.studies.ledger import Ledger
from hpc_c2g.studies.study import read_study
from hpc_c2g.studies.view import look
from launch.arguments import as_overrides
from launch.cli import run_verb, user_errors


@dataclass
class CollectConfig:
    """Of which study.

    Attributes:
        study_dir: its folder.
    """

    study_dir: str = "???"


def collect(config: CollectConfig) -> None:
    """Write the tables, and show the means."""
    folder = Path(config.study_dir)
    study = read_study(folder)
    grouped, left_out = gather(folder, study.study.name, look(folder, Ledger(folder).rows(), None))
    columns, cells = shown(grouped)
    out = Table(title=f"{study.study.name}: means ± standard deviations over seeds; evaluation uses real data")
    for column in columns:
        out.add_column(column, justify="right")
    for line in cells:
        out.add_row(*line)
    Console(width=180).print(out)
    for text in left_out:
        print(f"left out: {text}", file=sys.stderr)
    print(f"written: {folder}/results.md, results.csv, results.json")


def main() -> None:
    """Entry point."""
    with user_errors("collect"):
        overrides = as_overrides(sys.argv[1:], CollectConfig, ["study_dir"])
    run_verb("collect", CollectConfig, collect, overrides=overrides)


if __name__ == "__main__":
    main()
