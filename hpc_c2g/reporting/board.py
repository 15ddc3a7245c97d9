"""A study in TensorBoard: event files of its own beside links to its runs'; only the parts that changed are written again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc_c2g.evaluation.metric_registry import COLUMNS as METRIC_COLUMNS
from hpc_c2g.files import write_atomically, writing
from hpc_c2g.monitoring import summaries
from hpc_c2g.monitoring.event_file import EventFile
from hpc_c2g.monitoring.layout import AVERAGED
from hpc_c2g.reporting.averages import Average
from hpc_c2g.reporting.page import Picture
from hpc_c2g.reporting.results import MEASURED, MEASURES, NO_POINT, OF_CLASSIFIERS, SEEDS, Row

FORMAT = 3
"""Version of how parts are written; raised when that changes, so that all of them are written again."""
MEAN_POINTS = 100
"""Largest number of steps of a curve of means: more steps than a chart has pixels cost time and space."""
FOLDER, STUDY, RUNS = "board", "0-study", "runs"
COLUMNS = (MEASURED[0], *METRIC_COLUMNS, *MEASURED[1:], *OF_CLASSIFIERS)
"""Measures in the order of the HParams page, which shows the first five."""
Write = Callable[[EventFile], None]


class Board:
    """A study's folder for TensorBoard, made of parts; a manifest keeps a digest of what each was made from.

    Args:
        study: Folder of the study.
    """

    def __init__(self, study: Path) -> None:
        self.folder = study / FOLDER
        self.kept = _manifest(self.folder / "manifest.json")
        self.parts: dict[str, str] = {}
        self.written: list[str] = []

    def part(self, name: str, source: Any, write: Write) -> None:
        """Keep a part as it is if its source has not changed, else write it again.

        Args:
            name: Name of its folder below ``STUDY``.
            source: Plain values that it is made from.
            write: Function that writes its events.

        Raises:
            UserError: The part cannot be written.
        """
        unchanged = self.is_current(name, source)
        name = f"{STUDY}/{name}"
        self.parts[name] = _digest(source)
        if unchanged:
            return
        place = self.folder / name
        self.written.append(name)
        with writing(self.folder):
            fresh = place.with_name(f".{place.name}.{os.getpid()}")
            shutil.rmtree(fresh, ignore_errors=True)
            with EventFile(fresh) as events:
                write(events)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(fresh, place)

    def is_current(self, name: str, source: Any) -> bool:
        """Return True if a part is there and was made from this source."""
        name = f"{STUDY}/{name}"
        return self.kept.get(name) == _digest(source) and (self.folder / name).is_dir()

    def link(self, runs: Mapping[str, Path]) -> None:
        """Link the runs' own event folders.

        Args:
            runs: Event folders by the name of their link; those that do not exist yet are left out.

        Raises:
            UserError: A link cannot be written.
        """
        wanted = {name: path for name, path in runs.items() if path.is_dir()}
        with writing(self.folder):
            place = self.folder / RUNS
            place.mkdir(parents=True, exist_ok=True)
            for old in place.iterdir():
                if old.is_symlink() and (
                    old.name not in wanted or os.readlink(old) != _relative(place, wanted[old.name])
                ):
                    old.unlink()
            for name, path in wanted.items():
                if not (place / name).is_symlink():
                    os.symlink(_relative(place, path), place / name)

    def close(self) -> None:
        """Remove the parts that this collection did not have, and write the manifest of the others.

        Raises:
            UserError: The folder cannot be written.
        """
        with writing(self.folder):
            for name in self.kept.keys() - self.parts.keys():
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.parts != self.kept or self.written:
            content = json.dumps({"format": FORMAT, "parts": self.parts}).encode()
            write_atomically(self.folder / "manifest.json", content)


def _relative(place: Path, path: Path) -> str:
    return os.path.relpath(path.absolute(), place.absolute())


def _manifest(file: Path) -> dict[str, str]:
    try:
        content = json.loads(file.read_text())
        return dict(content["parts"]) if content["format"] == FORMAT else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _digest(source: Any) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True, default=str).encode()).hexdigest()[:16]


def named(label: str) -> str:
    """Return a label as the name of one folder."""
    return re.sub(r"[^\w.=+,\[\]()@-]+", " ", label).strip(" .")[:100] or "all"


def write_averages(averages: Mapping[str, Average]) -> Write:
    """Return the writer of means as scalars of the runs' own names, of the ends of their bands, and of charts that draw the bands."""

    def write(events: EventFile) -> None:
        by_steps: dict[tuple[int, ...], dict[str, list[float]]] = {}
        for tag, one in averages.items():
            kept = np.unique(np.linspace(0, len(one.steps) - 1, min(len(one.steps), MEAN_POINTS)).round().astype(int))
            curves = by_steps.setdefault(tuple(one.steps[kept].tolist()), {})
            ends = {tag: one.mean, f"{tag}/low": one.low, f"{tag}/high": one.high}
            curves |= {name: values[kept].tolist() for name, values in ends.items()}
        for steps, curves in by_steps.items():
            events.add_curves(steps, curves)
        # TensorBoard shows charts of this kind in reverse
        charts = {tag: (tag, f"{tag}/low", f"{tag}/high") for tag in reversed(AVERAGED) if tag in averages}
        events.add(summaries.margin_charts("Mean over seeds, 95 % interval", charts))

    return write


def write_against(variable: str, rows: Sequence[Row]) -> Write:
    """Return the writer of the groups' final metrics, the swept variable as the step."""

    def write(events: EventFile) -> None:
        for row in rows:
            final = {f"final/{_labeled(name)}": row[name] for name in MEASURES if isinstance(row.get(name), float)}
            events.add(summaries.scalars(final), int(row[variable]))

    return write


def write_hyperparameters(point: Row, row: Row) -> Write:
    """Return the writer of one run as a session of the HParams page: its point of the grid, and all its metrics."""

    def write(events: EventFile) -> None:
        metrics = {_labeled(name): float(row[name]) for name in MEASURES if isinstance(row.get(name), (int, float))}
        for summary in summaries.session(_plain(point)):
            events.add(summary)
        events.add(summaries.scalars(metrics), int(row.get("steps") or 0))

    return write


def write_columns(rows: Sequence[Row]) -> Write:
    """Return the writer of the columns of the HParams page, in their order."""

    def write(events: EventFile) -> None:
        points = {name: value for row in rows for name, value in row.items() if name not in NO_POINT}
        metrics = [_labeled(name) for name in COLUMNS if any(name in row for row in rows)]
        events.add(summaries.experiment(_plain(points), metrics))

    return write


def write_pictures(figures: Sequence[Picture], mosaics: Sequence[Picture], tables: Mapping[str, str]) -> Write:
    """Return the writer of figures and mosaics as images, of their descriptions beside them, and of tables as text."""

    def write(events: EventFile) -> None:
        for name, text in tables.items():
            events.add(summaries.text(name, text))
        for folder, pictures in (("figures", figures), ("samples", mosaics)):
            for picture in pictures:
                name = f"{folder}/{named(picture.title)}"
                events.add(summaries.png(name, picture.png))
                events.add(summaries.text(name, picture.alt))

    return write


def _plain(point: Row) -> dict[str, bool | int | float | str]:
    """The values of a point as the HParams page knows them."""
    return {name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in point.items()}


def _labeled(name: str) -> str:
    return f"{name} (uses real data)" if name in METRIC_COLUMNS else name


def numeric_variables(groups: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Return the groups in rising order of each swept field of several whole numbers: by that field, by the label of the others."""
    fields = {k for row in groups for k in row} - {
        "runs",
        "alarmed",
        *SEEDS,
        *(f"{m}{e}" for m in MEASURES for e in ("", "_sd")),
    }
    found: dict[str, dict[str, list[Row]]] = {}
    for variable in sorted(fields):
        values = [row.get(variable) for row in groups]
        if len(set(values)) < 2 or not all(isinstance(v, int) and v >= 0 for v in values):
            continue  # TensorBoard's steps are whole numbers
        for row in groups:
            rest = " ".join(f"{k}={row[k]}" for k in sorted(fields - {variable}) if k in row)
            found.setdefault(variable, {}).setdefault(rest, []).append(row)
        for own in found[variable].values():
            own.sort(key=lambda row: int(row[variable]))
    return found
