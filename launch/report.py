"""``c2g report DIR``: a study as one HTML file that can be sent: figures, tables, pictures, and commands that repeat every run."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_c2g.files import write_atomically
from hpc_c2g.monitoring.provenance import revision, versions
from hpc_c2g.monitoring.signatures import BY_NAME
from hpc_c2g.reporting.results import Results, Row, bound_groups
from hpc_c2g.reporting.tables import cell, columns
from hpc_c2g.studies.study import read_study
from hpc_c2g.studies.task_status import TaskStatus, read_statuses
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors
from launch._compose.recipes import recipes
from launch.status import counts

if TYPE_CHECKING:
    from hpc_c2g.reporting.averages import Curves
    from hpc_c2g.reporting.page import Cell, Table

MOSAICS = 24
"""Number of groups whose samples are shown, to limit the size of the page."""


@dataclass
class ReportConfig:
    """Settings of the report.

    Attributes:
        study_dir: Folder of the study.
        out: File to write; None takes report.html in the study's folder.
    """

    study_dir: str = "???"
    out: str | None = None


def report(config: ReportConfig) -> None:
    """Collect the results, and write the page."""
    from hpc_c2g.reporting.collect import collect, figure_source, mosaics
    from hpc_c2g.reporting.page import Page, render

    folder = Path(config.study_dir)
    study = read_study(folder)
    views = read_statuses(folder, None)
    found = collect(folder, study.study.name, views)
    runs = found.runs
    pictures = mosaics(folder, found.results, runs)
    notes = [f"left out: {text}" for text in found.results.left_out]
    notes += [f"run {key}: {text}" for key, texts in found.skipped.items() for text in texts]
    if len(pictures) > MOSAICS:
        notes.append(f"samples of {MOSAICS} of {len(pictures)} groups are shown; c2g board {folder} has all")
    page = Page(
        title=study.study.name,
        about=study.study.about,
        generated=f"{time.strftime('%Y-%m-%d %H:%M %Z')}, from {folder.absolute().name}",
        states=counts(views),
        notes=notes,
        tables=tables(found.results),
        figures=figure_source(found.results, found.curves, found.prediction).figures(),
        mosaics=pictures[:MOSAICS],
        alarms=alarms(found.curves.read(runs), runs),
        recipes=recipes(folder),
        versions={"revision": revision(), **versions()},
    )
    out = Path(config.out) if config.out else folder / "report.html"
    write_atomically(out, render(page).encode())
    print(f"written: {out}")


def tables(found: Results) -> list[Table]:
    """Return the tables of groups, sampling errors, and runs."""
    made = []
    if found.groups:
        title = "Means over seeds"
        caption = "Mean ± standard deviation over runs that differ in their seed only; evaluation uses real data, after training."
        made.append(_table(title, caption, found.groups))
    if found.sampling:
        caption = "Error of the KKT sum against the batch size, beside its law and its bound; without data."
        made.append(_table("Sampling errors", caption, bound_groups(found.sampling)))
    if found.rows:
        made.append(_table("Runs", "Every run that is done; evaluation uses real data, after training.", found.rows))
    return made


def _table(title: str, caption: str, rows: list[Row]) -> Table:
    from hpc_c2g.reporting.page import Table

    names = [name for name in columns(rows) if not name.endswith("_sd")]
    numeric = [all(isinstance(row.get(name), (int, float, type(None))) for row in rows) for name in names]
    cells: list[list[Cell]] = [[(cell(row.get(n), row.get(f"{n}_sd")), row.get(n)) for n in names] for row in rows]
    return Table(title, caption, names, cells, numeric)


def alarms(curves: Mapping[str, Curves], runs: dict[str, TaskStatus]) -> Table:
    """Return a table of the signatures of failure that ever fired, with time and level."""
    from hpc_c2g.reporting.page import Table

    rows: list[list[Cell]] = []
    for key, view in runs.items():
        for name, signature in BY_NAME.items():
            steps, values = curves[key].points(f"alarm/{name}")
            fired = steps[values > 0]
            if len(fired):
                highest = float(curves[key].points(f"signature/{name}")[1].max())
                now = "yes" if fired[-1] == steps[-1] else "no"
                rows.append(
                    [key, view.task.label, name, int(fired[0]), highest, now, signature.reason, signature.advice]
                )
    names = ["run", "point", "signature", "first at step", "highest level", "to the end", "reason", "advice"]
    caption = "Signatures of failing runs, from training's own scalars, without data; a level above 1 fires."
    return Table("Alarms", caption, names, rows, [False, False, False, True, True, False, False, False])


def main() -> None:
    """Run the verb."""
    with user_errors("report"):
        overrides = as_overrides(sys.argv[1:], ReportConfig, ["study_dir"])
    run_verb("report", ReportConfig, report, overrides=overrides)


if __name__ == "__main__":
    main()
