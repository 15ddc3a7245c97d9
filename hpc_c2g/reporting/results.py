"""A study's results: a row per training run, and means over runs that differ in their seed only. Evaluation *uses real data*."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_c2g.evaluation.metric_registry import COLUMNS as METRIC_COLUMNS
from hpc_c2g.evaluation.metric_registry import numbers
from hpc_c2g.files import last_line
from hpc_c2g.studies.reports import load_report
from hpc_c2g.studies.task_status import TaskStatus

MEASURED = ("stationarity", "alpha", "rho", "samples_per_second")
"""Scalars of the last logged step, computed without data."""
OF_CLASSIFIERS = ("certificate", "classifier_accuracy")
MEASURES = (*MEASURED, *METRIC_COLUMNS, *OF_CLASSIFIERS)
SAMPLED = ("error", "predicted", "quantile", "bound", "residual_bias")
SEEDS = ("seed", "train.seed", "classifier.seed")
NO_POINT = (*MEASURES, "id", "steps", "alarms")
"""Fields of a row that do not belong to its point in the grid."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Results of a study so far.

    Attributes:
        rows: Rows of the finished training runs, one each.
        groups: Means and standard deviations over rows that differ in their seed only.
        sampling: Measured errors of the KKT sum.
        left_out: Missing results, each with the reason.
    """

    rows: list[Row]
    groups: list[Row]
    sampling: list[Row]
    left_out: list[str]


def results(study: Path, views: Sequence[TaskStatus]) -> Results:
    """Read the results of the study's runs from their folders."""
    found, left_out = rows(study, views)
    return Results(found, groups(found), bounds(study, views), left_out)


def rows(study: Path, views: Sequence[TaskStatus]) -> tuple[list[Row], list[str]]:
    """Return (a row per finished training run, the missing results with their reasons)."""
    by_id = {v.task.id: v for v in views}
    judges = {v.task.folder: v for v in views if v.task.stage == "evaluate"}
    trained = training_runs(views) or [v for v in views if v.task.stage == "classifier"]
    several = len({v.task.nodes for v in trained}) > 1
    found: list[Row] = []
    left_out: list[str] = []
    for view in trained:
        name = f"{view.task.stage} {view.task.id} ({public(view.task.label)})"
        if view.state != "done":
            left_out.append(f"{name}: {view.state}{f': {view.reason}' if view.reason else ''}")
            continue
        row: Row = {"id": view.task.id, **point_of(view.task.label)}
        if several:
            row["nodes"] = view.task.nodes
        folders = [by_id[u].task.folder for u in view.task.upstream if u in by_id] or [view.task.folder]
        for reader in (_certificates, _fits):
            row |= reader(study, folders)
        if view.task.stage == "train":
            row |= _measured(study / view.task.folder)
            judge = judges.get(view.task.folder)
            if judge is not None and judge.state == "done":
                judged = evaluation_of(study / view.task.folder)
                row |= judged
                if not judged:
                    left_out.append(
                        f"evaluation of {view.task.id} ({public(view.task.label)}): evaluation.json cannot be read"
                    )
            elif judge is not None:
                left_out.append(f"evaluation of {view.task.id} ({public(view.task.label)}): {judge.state}")
            if view.alarms:
                row["alarms"] = " ".join(view.alarms)
        found.append(row)
    return found, left_out + _other_versions(study, trained)


def _other_versions(study: Path, trained: Sequence[TaskStatus]) -> list[str]:
    """Return a note for each run that was made by other versions than most: differences of its results may come from these."""
    made: list[tuple[TaskStatus, dict[str, str]]] = []
    for view in trained:
        report = load_report(study / view.task.folder / f"{view.task.stage}.report.json", view.task.id)
        if report is not None and report.versions:
            made.append((view, report.versions))
    usual = {
        name: Counter(versions[name] for _, versions in made if name in versions).most_common(1)[0][0]
        for name in {name for _, versions in made for name in versions}
    }
    notes = []
    for view, versions in made:
        other = [f"{name} {value} (most: {usual[name]})" for name, value in versions.items() if value != usual[name]]
        if other:
            notes.append(
                f"{view.task.stage} {view.task.id} ({public(view.task.label)}) is kept, but was made by {', '.join(other)}"
            )
    return notes


def training_runs(views: Sequence[TaskStatus]) -> list[TaskStatus]:
    """The study's training runs."""
    return [v for v in views if v.task.stage == "train"]


def point_of(label: str) -> Row:
    """Return the fields of the grid in a label such as ``global_batch=50 seed=0``, numbers as numbers."""
    return {key: _number(value) for key, _, value in (part.partition("=") for part in _parts(label)) if key}


def public(label: str) -> str:
    """Return a label without the location of the data, which is private to this machine."""
    return " ".join(part for part in _parts(label) if not part.partition("=")[0].endswith("data.root"))


def _parts(label: str) -> list[str]:
    """Split a label into its ``field=value`` parts; a value may have blanks."""
    return re.split(r" (?=[+~]*[A-Za-z_][\w./@]*=)", label)


def without_seeds(point: Row) -> Row:
    """Return the fields that the runs of one group have in common."""
    return {k: v for k, v in point.items() if k not in SEEDS and not k.endswith("data.root")}


def label_of(point: Row) -> str:
    """Return the label of a group for readers."""
    return " ".join(f"{k}={v}" for k, v in point.items()) or "all runs"


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _certificates(study: Path, folders: Sequence[str]) -> Row:
    """Return the mean over the classifiers of their smallest relative residual in any form."""
    certificates = [_load(study / folder / "certificate.json") for folder in folders]
    best = [min(c["relative_residual"] for c in forms) for forms in certificates if forms]
    return {"certificate": statistics.mean(best)} if best else {}


def _fits(study: Path, folders: Sequence[str]) -> Row:
    records = [r for f in folders if (r := _load(study / f / "fit.json"))]
    accuracies = [r["held_out_accuracy"] for r in records if "held_out_accuracy" in r]
    return {"classifier_accuracy": statistics.mean(accuracies)} if accuracies else {}


def _measured(folder: Path) -> Row:
    last = last_line(folder / "metrics.jsonl")
    return {name: last[name] for name in MEASURED if name in last} | {"steps": last.get("step")} if last else {}


def evaluation_of(folder: Path) -> Row:
    """Return the metrics of one generator's samples; with several classifiers the mean over them."""
    content = _load(folder / "evaluation.json")
    if not isinstance(content, dict):
        return {}
    parts = [numbers(part) for part in content.get("classifiers", [content])]
    values = {name: [part[name] for part in parts if name in part] for name in METRIC_COLUMNS}
    return {name: statistics.mean(own) for name, own in values.items() if own}


def members(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each group by its label."""
    grouped: dict[str, list[Row]] = {}
    for row in found:
        point = {k: v for k, v in row.items() if k not in NO_POINT}
        grouped.setdefault(label_of(without_seeds(point)), []).append(row)
    return grouped


def groups(found: Sequence[Row]) -> list[Row]:
    """Return mean and standard deviation (of the sample) over runs that differ in their seed only."""
    result = []
    for own in members(found).values():
        point = without_seeds({k: v for k, v in own[0].items() if k not in NO_POINT})
        out: Row = {**point, "runs": len(own)}
        for name in MEASURES:
            values = [m[name] for m in own if isinstance(m.get(name), (int, float)) and math.isfinite(m[name])]
            if values:
                out[name] = statistics.mean(values)
                out[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        if alarmed := sum("alarms" in m for m in own):
            out["alarmed"] = alarmed
        result.append(out)
    return result


def bounds(study: Path, views: Sequence[TaskStatus]) -> list[Row]:
    """Return rows of the sampling errors that the study's runs measured, each with its run's point."""
    found = []
    for view in views:
        if view.task.stage == "bound" and view.state == "done":
            content = _load(study / view.task.folder / "sampling_error.json") or {}
            for k, part in enumerate(content.get("classifiers", [])):
                found += [
                    {"id": view.task.upstream[0], **point_of(view.task.label), "classifier": k, **r}
                    for r in part["rows"]
                ]
    return found


def bound_groups(errors: Sequence[Row]) -> list[Row]:
    """Return means over runs of the sampling errors of each scheme and batch."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in errors:
        grouped.setdefault((row["classifier"], row["scheme"], row["batch"]), []).append(row)
    return [
        {"classifier": k, "scheme": scheme, "batch": batch, "runs": len(own)}
        | {name: statistics.mean(m[name] for m in own) for name in SAMPLED}
        for (k, scheme, batch), own in grouped.items()
    ]
