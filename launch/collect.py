"""``c2g collect DIR``: a study's runs brought together: tables in its folder, and its board for TensorBoard."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hpc_c2g.reporting.tables import shown
from hpc_c2g.studies.study import read_study
from hpc_c2g.studies.task_status import read_statuses
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors

if TYPE_CHECKING:
    from hpc_c2g.reporting.collect import Collected

SHOWN = 20
"""Lines about what was left out or skipped, unless all are asked for."""


@dataclass
class CollectConfig:
    """Settings of ``c2g collect``.

    Attributes:
        study_dir: Folder of the study.
        all: True prints every line about what was left out or skipped.
    """

    study_dir: str = "???"
    all: bool = False


def collected(folder: Path) -> Collected:
    """Bring the study's tables and board up to date."""
    from hpc_c2g.reporting.collect import collect as bring_together  # slow to import: after the settings are checked

    study = read_study(folder)
    return bring_together(folder, study.study.name, read_statuses(folder, None))


def collect(config: CollectConfig) -> None:
    """Collect the study, and print its means."""
    from hpc_c2g.reporting.board import FOLDER

    folder = Path(config.study_dir)
    found = collected(folder)
    columns, cells = shown(found.results.groups)
    out = Table(title=f"{folder}: means ± standard deviations over seeds; evaluation uses real data")
    for column in columns:
        out.add_column(column, justify="right")
    for line in cells:
        out.add_row(*line)
    Console(width=180).print(out)
    notes = [f"left out: {text}" for text in found.results.left_out]
    notes += [f"run {key}: {text}" for key, texts in found.skipped.items() for text in texts]
    for text in notes if config.all else notes[:SHOWN]:
        print(text, file=sys.stderr)
    if len(notes) > SHOWN and not config.all:
        print(f"{len(notes) - SHOWN} more: --all prints them", file=sys.stderr)
    board = f"{len(found.changed)} parts of {folder / FOLDER}" if found.changed else "nothing new for the board"
    print(f"written: {folder}/{', '.join(found.files)}; {board} (c2g board {folder} shows it)")


def main() -> None:
    """Entry point."""
    with user_errors("collect"):
        overrides = as_overrides(sys.argv[1:], CollectConfig, ["study_dir"])
    run_verb("collect", CollectConfig, collect, overrides=overrides)


if __name__ == "__main__":
    main()
