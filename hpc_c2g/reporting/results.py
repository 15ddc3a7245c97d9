"""A study's results in one place: a row per training run, and means over what only the seed sets apart. Evaluation *uses real data*."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_c2g.files import write_atomically
from hpc_c2g.studies.view import View

METRICS = ("oracle_accuracy", "transfer_accuracy", "proximity", "coverage", "diversity")
MEASURED = ("stationarity", "alpha", "rho", "samples_per_second")
SAMPLED = ("error", "predicted", "quantile", "bound", "residual_bias")
SEEDS = ("seed", "train.seed", "classifier.seed")
Row = dict[str, Any]


def rows(study: Path, views: Sequence[View]) -> tuple[list[Row], list[str]]:
    """(a row per training run that is done, what was left out and why)."""
    by_id = {v.row.id: v for v in views}
    found: list[Row] = []
    left_out: list[str] = []
    trained = [v for v in views if v.row.stage == "train"] or [v for v in views if v.row.stage == "classifier"]
    for view in trained:
        name = f"{view.row.stage} {view.row.id} ({view.row.label})"
        if view.state != "done":
            left_out.append(f"{name}: {view.state}{f': {view.reason}' if view.reason else ''}")
            continue
        row: Row = {"id": view.row.id, **_point(view.row.label)}
        folders = [by_id[u].row.folder for u in view.row.upstream if u in by_id] or [view.row.folder]
        for reader in (_certificates, _fits):
            row |= reader(study, folders)
        if view.row.stage == "train":
            row |= _measured(study / view.row.folder)
            judged = [v for v in views if v.row.stage == "evaluate" and v.row.folder == view.row.folder]
            if any(v.state == "done" for v in judged):
                row |= _evaluation(study / view.row.folder)
            elif judged:
                left_out.append(f"evaluation of {view.row.id} ({view.row.label}): {judged[0].state}")
        found.append(row)
    return found, left_out


def _point(label: str) -> Row:
    return {key: _number(value) for key, _, value in (part.partition("=") for part in label.split(" ")) if key}


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
    """Mean over the classifiers of their smallest relative residual in any form."""
    certificates = [_load(study / folder / "certificate.json") for folder in folders]
    best = [min(c["relative_residual"] for c in forms) for forms in certificates if forms]
    return {"certificate": statistics.mean(best)} if best else {}


def _fits(study: Path, folders: Sequence[str]) -> Row:
    records = [r for f in folders if (r := _load(study / f / "fit.json"))]
    accuracies = [r["held_out_accuracy"] for r in records if "held_out_accuracy" in r]
    return {"classifier_accuracy": statistics.mean(accuracies)} if accuracies else {}


def _measured(folder: Path) -> Row:
    try:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return {name: last[name] for name in MEASURED if name in last} | {"steps": last.get("step")}


def _evaluation(folder: Path) -> Row:
    """Of one generator's samples; with several classifiers the mean over them."""
    content = _load(folder / "evaluation.json") or {}
    parts = content.get("classifiers", [content])
    found = {}
    for name in METRICS:
        values = [p[name] for p in parts if isinstance(p.get(name), (int, float))]
        if values:
            found[name] = statistics.mean(values)
    return found


def groups(found: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation (of the sample) over runs that only their seed sets apart."""
    measures = [*MEASURED, *METRICS, "certificate", "classifier_accuracy"]
    grouped: dict[str, list[Row]] = {}
    for row in found:
        point = {k: v for k, v in row.items() if k not in (*measures, *SEEDS, "id", "steps")}
        grouped.setdefault(json.dumps(point, sort_keys=True), []).append(row)
    result = []
    for key, members in grouped.items():
        out: Row = {**json.loads(key), "runs": len(members)}
        for name in measures:
            values = [m[name] for m in members if isinstance(m.get(name), (int, float)) and math.isfinite(m[name])]
            if values:
                out[name] = statistics.mean(values)
                out[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        result.append(out)
    return result


def bounds(study: Path, views: Sequence[View]) -> list[Row]:
    """Rows of the sampling errors that the study's runs measured, each with its run's point."""
    found = []
    for view in views:
        if view.row.stage == "bound" and view.state == "done":
            content = _load(study / view.row.folder / "sampling_error.json") or {}
            for k, part in enumerate(content.get("classifiers", [])):
                found += [
                    {"id": view.row.upstream[0], **_point(view.row.label), "classifier": k, **r} for r in part["rows"]
                ]
    return found


def bound_groups(errors: Sequence[Row]) -> list[Row]:
    """Means over runs of the sampling errors of each scheme and batch."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in errors:
        grouped.setdefault((row["classifier"], row["scheme"], row["batch"]), []).append(row)
    return [
        {"classifier": k, "scheme": scheme, "batch": batch, "runs": len(members)}
        | {name: statistics.mean(m[name] for m in members) for name in SAMPLED}
        for (k, scheme, batch), members in grouped.items()
    ]


def collect(study: Path, name: str, views: Sequence[View]) -> tuple[list[Row], list[str]]:
    """Write ``results.json``, ``results.csv`` and ``results.md`` into the study's folder; returns groups and what was left out.

    Raises:
        C2GError: a file cannot be written.
    """
    found, left_out = rows(study, views)
    grouped, errors = groups(found), bounds(study, views)
    content = {
        "study": name,
        "uses_real_data": True,
        "runs": found,
        "groups": grouped,
        "sampling": errors,
        "left_out": left_out,
    }
    write_atomically(study / "results.json", json.dumps(content, indent=1).encode())
    write_atomically(study / "results.csv", as_csv(found).encode())
    write_atomically(study / "results.md", as_markdown(name, grouped, bound_groups(errors), left_out).encode())
    return grouped, left_out


def _columns(found: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(k for row in found for k in row))


def as_csv(found: Sequence[Row]) -> str:
    """All rows, a column per field that any of them has."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _columns(found), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def shown(grouped: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table of groups, mean +- standard deviation."""
    columns = [c for c in _columns(grouped) if not c.endswith("_sd")]
    cells = []
    for row in grouped:
        cells.append([_cell(row.get(c), row.get(f"{c}_sd")) for c in columns])
    return columns, cells


def _cell(value: Any, deviation: Any = None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if deviation is None else f"{value:.4g} ± {deviation:.2g}"
    return str(value)


def as_markdown(name: str, grouped: Sequence[Row], errors: Sequence[Row], left_out: Sequence[str]) -> str:
    """The table of groups, the sampling errors, and what is missing."""
    lines = [
        f"# {name}",
        "",
        "Means ± standard deviations over runs that differ in their seed alone; evaluation uses real data.",
        "",
    ]
    for table in (grouped, errors):
        if table:
            columns, cells = shown(table)
            lines += [_line(columns), _line(["---"] * len(columns)), *map(_line, cells), ""]
    if left_out:
        lines += ["Left out:", "", *(f"- {text}" for text in left_out), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
