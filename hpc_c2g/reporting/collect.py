"""Collection of a study's runs: tables, and a folder for TensorBoard; what did not change since the last time is left as it is."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.monitoring.event_file import BOARD, EVALUATION, EventFile
from hpc_c2g.reporting.board import (
    FOLDER,
    Board,
    named,
    numeric_variables,
    write_against,
    write_averages,
    write_columns,
    write_hyperparameters,
    write_pictures,
)
from hpc_c2g.reporting.mosaics import mosaic, ranked
from hpc_c2g.reporting.page import Picture
from hpc_c2g.reporting.pictures import FigureSource, pictures
from hpc_c2g.reporting.results import (
    NO_POINT,
    Results,
    bound_groups,
    label_of,
    members,
    point_of,
    results,
    training_runs,
    without_seeds,
)
from hpc_c2g.reporting.run_curves import stamp_of
from hpc_c2g.reporting.study_curves import StudyCurves
from hpc_c2g.reporting.tables import as_markdown, write_tables
from hpc_c2g.studies.task_status import TaskStatus
from hpc_c2g.studies.tasks import read_spec, spec_name

NOTES, PLAN = "skipped.json", "plan.json"


@dataclass(frozen=True)
class Collected:
    """A study's results and curves, with what was written of them.

    Attributes:
        results: Tables of the study.
        runs: Training runs that have begun, by id.
        curves: Curves of those runs.
        files: Names of the tables' files in the study's folder.
        changed: Parts of the board that were written again.
        skipped: Lines and values left out of the runs' metrics and why, by run.
        prediction: Predicted samples per second by number of nodes, see ``predicted``.
    """

    results: Results
    runs: dict[str, TaskStatus]
    curves: StudyCurves
    files: list[str]
    changed: list[str]
    skipped: dict[str, tuple[str, ...]]
    prediction: dict[int, float] | None


def collect(study: Path, name: str, views: Sequence[TaskStatus]) -> Collected:
    """Write the tables and the board.

    Args:
        study: Folder of the study.
        name: Name of the study.
        views: Statuses of all its tasks.

    Raises:
        UserError: A file cannot be written.
    """
    found = results(study, views)
    runs = {v.task.id: v for v in training_runs(views) if v.attempts}
    prediction = None
    try:
        prediction = predicted(study, runs)
    except UserError as error:  # a damaged plan costs its prediction alone
        found.left_out.append(str(error))
    files = write_tables(study, name, found)
    folders = {key: study / v.task.folder for key, v in runs.items()}
    curves = StudyCurves(folders, grouped(runs), study / FOLDER / NOTES)
    skipped = curves.skipped()
    board = Board(study)
    stamps = {label: curves.stamps_of(label) for label in curves.groups}
    for label, own in stamps.items():
        board.part(f"mean/{named(label)}", own, functools.partial(_write_means, curves, label))
    for variable, lines in numeric_variables(found.groups).items():
        for rest, rows in lines.items():
            title = f"against {variable}/{named(rest)}" if len(lines) > 1 else f"against {variable}"
            board.part(title, rows, write_against(variable, rows))
    if found.rows:
        kinds = sorted({(name, type(value).__name__) for row in found.rows for name, value in row.items()})
        board.part("hparams/0", kinds, write_columns(found.rows))
    for row in found.rows:
        point = {k: v for k, v in row.items() if k not in NO_POINT}
        board.part(f"hparams/{row['id']}", row, write_hyperparameters(point, row))
    samples = {row["id"]: stamp_of(folders[row["id"]] / "samples.png") for row in found.rows if row["id"] in runs}
    sources = [found.rows, found.sampling, found.left_out, stamps, samples, prediction]
    board.part("pictures", sources, functools.partial(_write_pictures, study, name, found, runs, curves, prediction))
    board.link(links(study, runs))
    board.close()
    return Collected(found, runs, curves, files, board.written, skipped, prediction)


def _write_means(curves: StudyCurves, label: str, events: EventFile) -> None:
    write_averages(curves.averages([label])[label])(events)


def _write_pictures(
    study: Path,
    name: str,
    found: Results,
    runs: Mapping[str, TaskStatus],
    curves: StudyCurves,
    prediction: Mapping[int, float] | None,
    events: EventFile,
) -> None:
    drawn = pictures(figure_source(found, curves, prediction))
    write_pictures(drawn, mosaics(study, found, runs), {"results": as_markdown(name, found)})(events)


def grouped(runs: Mapping[str, TaskStatus]) -> dict[str, list[str]]:
    """Return the ids of each group's runs, including those that are running, by the group's label."""
    found: dict[str, list[str]] = {}
    for key, view in runs.items():
        found.setdefault(label_of(without_seeds(point_of(view.task.label))), []).append(key)
    return found


def figure_source(found: Results, curves: StudyCurves, prediction: Mapping[int, float] | None) -> FigureSource:
    """Return the numbers that the study's figures show."""
    return FigureSource(found.groups, bound_groups(found.sampling), curves.averages(curves.groups), prediction)


def mosaics(study: Path, found: Results, runs: Mapping[str, TaskStatus]) -> list[Picture]:
    """Return a picture per group of its best, median and worst run."""
    folders = {key: study / view.task.folder for key, view in runs.items()}
    made = [mosaic(label, ranked(rows), folders) for label, rows in members(found.rows).items()]
    return [picture for picture in made if picture is not None]


def predicted(study: Path, runs: Mapping[str, TaskStatus]) -> dict[int, float] | None:
    """Return the samples per second by number of nodes of the study's ``plan.json`` (`c2g plan ... out=`); None if it has none.

    The plan's weak scaling counts if the runs differ in their global batch, else its strong scaling.

    Raises:
        UserError: The plan, or the description of a run, cannot be read.
    """
    file = study / PLAN
    if not file.exists():
        return None
    try:
        plan = json.loads(file.read_text())
        rows = {
            kind: {r["nodes"]: r["global_batch"] / r["step"]["total"] for r in plan[kind]}
            for kind in ("strong", "weak")
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        hint = "write it again with `c2g plan ... out=`, or remove it"
        raise UserError(f"{PLAN} of the study cannot be read: {error!r}", hint) from error
    batches = {v.task.nodes: read_spec(study / spec_name(v.task)).config.get("global_batch") for v in runs.values()}
    return rows["weak" if len(set(batches.values())) > 1 else "strong"]


def links(study: Path, runs: Mapping[str, TaskStatus]) -> dict[str, Path]:
    """Return the event folders of every run and of its evaluation by readable names."""
    labels = {key: named(view.task.label) for key, view in runs.items()}
    times, found = Counter(labels.values()), {}
    for key, view in runs.items():
        several = times[labels[key]] > 1 or not view.task.label
        name = f"{labels[key]} {key}" if several else labels[key]
        found[name] = study / view.task.folder / BOARD
        found[f"{name} evaluation (uses real data)"] = study / view.task.folder / EVALUATION
    return found
