"""An experiment as a folder to publish: README.md with its tables, results.json, figures. Evaluation *uses real data*."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_c2g import markdown
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation.metric_registry import COLUMNS, numbers
from hpc_c2g.files import write_atomically
from hpc_c2g.reporting import memorization
from hpc_c2g.reporting.drawing import Figure
from hpc_c2g.reporting.results import MEASURED, OF_CLASSIFIERS, Results, members
from hpc_c2g.reporting.tables import cell
from hpc_c2g.studies.tasks import read_spec

PRIVATE = ("celeba",)
"""Data sets of which no picture is published."""
PLACE = re.compile(r"(?<=['\"])/[^'\"]*|(?<![\w.])/[^\s'\",;:)]+")
"""Pattern of an absolute path, such as in the text of an error."""
NOTES = "<!-- notes: what follows is kept when the tables are written again -->"
PICTURES = {
    "samples.png": "generated samples, a column per class",
    "nearest.png": "training images, the best recovered first, below them the nearest samples",
    "landscape.png": "training points over the classifier's margin, ringed where they carry multipliers; generated points beside them",
}


def content(study: Path, name: str, about: str, found: Results, folders: Mapping[str, str]) -> dict[str, Any]:
    """Return every group's metrics per seed, their means and deviations, and its baselines.

    Args:
        study: Folder of the study.
        name: Name of the experiment.
        about: Description in one line.
        found: Results of the study's runs.
        folders: Folder of each run below the study's, by id.
    """
    groups = {}
    for label, rows in members(found.rows).items():
        runs: list[dict[str, Any]] = []
        baselines: dict[str, list[dict[str, float]]] = {}
        recalled: list[list[memorization.Part]] = []
        efforts = _efforts(study / folders[rows[0]["id"]])
        for row in rows:
            evaluations = _evaluations(study / folders[row["id"]] / "evaluation.json")
            own = _mean(map(numbers, evaluations))
            recalled += [_by_multiplier(study, evaluation) for evaluation in evaluations]
            measured = {k: row[k] for k in (*MEASURED, *OF_CLASSIFIERS, "alarms", "steps") if k in row}
            runs.append({"id": row["id"], "seed": row.get("train.seed", row.get("seed")), **measured, **own})
            for evaluation in evaluations:
                for who, judged in evaluation.get("baselines", {}).items():
                    baselines.setdefault(who, []).append(numbers(judged))
        values = [{k: v for k, v in run.items() if isinstance(v, float)} for run in runs]
        groups[label] = {
            "runs": runs,
            "mean": _mean(values),
            "sd": _deviation(values),
            "baselines": {who: _mean(rows) for who, rows in baselines.items()},
            "by_multiplier": memorization.mean_parts(recalled) if all(recalled) else [],
            "efforts": {who: steps for who, steps in efforts.items() if who in ("generator", *baselines)},
        }
    left_out = [PLACE.sub("PATH", text) for text in found.left_out]
    return {"experiment": name, "about": about, "uses_real_data": True, "groups": groups, "left_out": left_out}


def _evaluations(file: Path) -> list[dict[str, Any]]:
    try:
        whole = json.loads(file.read_text())
    except (OSError, ValueError):
        return []
    return list(whole.get("classifiers", [whole]))


def _efforts(folder: Path) -> dict[str, dict[str, int]]:
    """Return the steps and the number of solutions of a run's generator and of the baselines that were trained beside it.

    Studies from before solutions existed have one.
    """
    try:
        own = read_spec(folder / "train.task.json").config
    except UserError:
        return {}
    generator = {"steps": own["steps"], "solutions": own.get("solutions", 1)}
    try:
        judge = read_spec(folder / "evaluate.task.json").config
    except UserError:
        return {"generator": generator}
    return {
        "generator": generator,
        "classification_only": {"steps": min(judge["classification_steps"], own["steps"]), "solutions": 1},
        "free_images": {"steps": judge["free_steps"], "solutions": 1},
    }


def _by_multiplier(study: Path, evaluation: Mapping[str, Any]) -> list[memorization.Part]:
    """Return the parts of one classifier of a run, whose folder is found in the study's present folder; empty if unknown."""
    folder = study / "classifiers" / Path(evaluation.get("classifier", "")).name
    return memorization.by_multiplier(evaluation.get("nearness", []), memorization.shares_in(folder) or []) or []


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows if name in row] for name in dict.fromkeys(k for row in rows for k in row)}


def _mean(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(values) for name, values in _columns(list(rows)).items()}


def _deviation(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.stdev(values) for name, values in _columns(rows).items() if len(values) > 1}


def table(group: Mapping[str, Any]) -> list[str]:
    """Return a markdown table: the generator above its baselines."""
    whole = [group["mean"], *group["baselines"].values()]
    names = [name for name in COLUMNS if any(name in row for row in whole)]
    count = len(group["runs"])
    own = [cell(group["mean"].get(n), group["sd"].get(n)) for n in names]
    generator = [f"**generator**, {count} seed{'s' if count > 1 else ''}", *own]
    baselines = [[who, *(cell(row.get(n)) for n in names)] for who, row in group["baselines"].items()]
    return markdown.table(["samples", *names], [generator, *baselines])


def _effort(who: str, effort: Mapping[str, int]) -> str:
    many = f" ({effort['solutions']} solutions)" if effort["solutions"] > 1 else ""
    return f"{who} {effort['steps']:,} steps{many}"


def readme(
    found: Mapping[str, Any], commands: Sequence[str], pictures: Sequence[tuple[str, str, str]], notes: str
) -> str:
    """Return the page of an experiment.

    Args:
        found: Result of ``content``.
        commands: Commands that repeat the experiment.
        pictures: (file, title, text alternative) of each picture.
        notes: Text that people wrote below the mark.
    """
    lines = [f"# {found['experiment']}: {found['about']}", "", *(f"    {command}" for command in commands), ""]
    lines += ["Means ± standard deviations over seeds; metrics *use real data* and were computed after training.", ""]
    for label, group in found["groups"].items():
        mean = group["mean"]
        numbers = [f"{name} {mean[name]:.3g}" for name in ("stationarity", *OF_CLASSIFIERS) if name in mean]
        alarms = sorted({a for run in group["runs"] for a in str(run.get("alarms", "")).split()})
        lines += [
            f"## {label}",
            "",
            f"{', '.join(numbers)}{f'; alarms: {chr(44).join(alarms)}' if alarms else ''}.",
            "",
        ]
        lines += [*table(group), ""]
        if group["efforts"]:
            lines += [
                f"Trained for: {'; '.join(_effort(who, effort) for who, effort in group['efforts'].items())}.",
                "",
            ]
        if group["by_multiplier"]:
            lines += [*markdown.table(*memorization.rows(group["by_multiplier"])), ""]
    for file, title, seen in pictures:
        lines += [f"![{seen}]({file})", "", f"*{title}*", ""]
    if found["left_out"]:
        lines += ["Left out:", "", *(f"- {text}" for text in found["left_out"]), ""]
    return "\n".join([*lines, NOTES, "", *([notes.strip(), ""] if notes.strip() else [])])


def publish(
    study: Path,
    out: Path,
    found: Mapping[str, Any],
    commands: Sequence[str],
    drawn: Sequence[Figure],
    folders: Mapping[str, str],
    data: Mapping[str, str],
) -> None:
    """Write the folder; existing notes stay.

    Args:
        study: Folder of the study.
        out: Folder to write.
        found: Result of ``content``.
        commands: Commands that repeat the experiment.
        drawn: Drawn figures.
        folders: Folder of each run below the study's, by id.
        data: Name of each run's data set, by id.

    Raises:
        UserError: The folder cannot be written.
    """
    pictures = []
    for figure in drawn:
        write_atomically(out / f"{figure.name}.svg", figure.svg.encode())
        pictures.append((f"{figure.name}.svg", figure.title, figure.alt))
    for label, group in found["groups"].items():
        first = group["runs"][0]
        for picture, seen in PICTURES.items() if data.get(first["id"]) not in PRIVATE else ():
            for file in sorted((study / folders[first["id"]]).glob(f"{Path(picture).stem}*.png")):
                name = f"{re.sub(r'[^A-Za-z0-9]+', '_', label)}-{file.name}"
                out.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, out / name)
                pictures.append((name, f"{label}: {seen}", f"{label}: {seen}"))
    page = out / "README.md"
    notes = page.read_text().partition(NOTES)[2] if page.is_file() else ""
    write_atomically(out / "results.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(page, readme(found, commands, pictures, notes).encode())
