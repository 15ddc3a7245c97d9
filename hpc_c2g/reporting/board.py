"""A study in TensorBoard: a folder of event files beside links to its runs' own, of which only what has changed is written again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_c2g.evaluation.metric_registry import COLUMNS as METRIC_COLUMNS
from hpc_c2g.files import write_atomically, writing
from hpc_c2g.monitoring.layout import AVERAGED
from hpc_c2g.monitoring.run_log import add_scalars, write_session, writer_of
from hpc_c2g.reporting.averages import Average
from hpc_c2g.reporting.drawing import Figure
from hpc_c2g.reporting.page import Picture
from hpc_c2g.reporting.results import MEASURED, MEASURES, NO_POINT, OF_CLASSIFIERS, SEEDS, Row

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FORMAT = 2  # raise it when parts are written differently: what was written before is then written again
FOLDER, STUDY, RUNS = "board", "0-study", "runs"
COLUMNS = (MEASURED[0], *METRIC_COLUMNS, *MEASURED[1:], *OF_CLASSIFIERS)
"""Measures in the order of the HParams page, which shows the first five."""
Write = Callable[["SummaryWriter"], None]


class Board:
    """A study's folder for TensorBoard, made of parts that each know what they were made from.

    Args:
        study: its folder.
    """

    def __init__(self, study: Path) -> None:
        self.folder = study / FOLDER
        self.kept = _manifest(self.folder / "manifest.json")
        self.parts: dict[str, str] = {}
        self.written: list[str] = []

    def part(self, name: str, source: Any, write: Write) -> None:
        """Have a part there: as it is where its source has not changed, else written again.

        Args:
            name: its folder below ``STUDY``.
            source: plain values that it is made from.
            write: writes it.

        Raises:
            UserError: it cannot be written.
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
            from torch.utils.tensorboard import SummaryWriter  # seconds

            with SummaryWriter(str(fresh)) as board:
                write(board)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(fresh, place)

    def is_current(self, name: str, source: Any) -> bool:
        """True if a part is there and was made from this source."""
        name = f"{STUDY}/{name}"
        return self.kept.get(name) == _digest(source) and (self.folder / name).is_dir()

    def link(self, runs: Mapping[str, Path]) -> None:
        """Show the runs' own event folders under names that people know; those that have none yet are left out."""
        wanted = {name: path for name, path in runs.items() if path.is_dir()}
        with writing(self.folder):
            place = self.folder / RUNS
            place.mkdir(parents=True, exist_ok=True)
            for old in place.iterdir():
                if old.is_symlink() and (old.name not in wanted or os.readlink(old) != _way(place, wanted[old.name])):
                    old.unlink()
            for name, path in wanted.items():
                if not (place / name).is_symlink():
                    os.symlink(_way(place, path), place / name)

    def close(self) -> None:
        """Drop parts that are no longer there, and remember what the others were made from."""
        with writing(self.folder):
            for name in self.kept.keys() - self.parts.keys():
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.parts != self.kept or self.written:
            content = json.dumps({"format": FORMAT, "parts": self.parts}).encode()
            write_atomically(self.folder / "manifest.json", content)


def _way(place: Path, path: Path) -> str:
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
    """A label as the name of one folder."""
    return re.sub(r"[^\w.=+,\[\]()@-]+", " ", label).strip(" .")[:100] or "all"


def write_averages(averages: Mapping[str, Average]) -> Write:
    """Means as scalars of the runs' own names, the ends of their bands beside them, and charts that draw the bands."""

    def write(board: SummaryWriter) -> None:
        by_step: dict[int, dict[str, float]] = {}
        for tag, one in averages.items():
            for step, mean, low, high in zip(one.steps, one.mean, one.low, one.high, strict=True):
                told = by_step.setdefault(int(step), {})
                told |= {tag: mean, f"{tag}/low": low, f"{tag}/high": high}
        for step, scalars in sorted(by_step.items()):
            add_scalars(board, scalars, step)
        # TensorBoard shows charts of this kind in reverse
        charts = {tag: ["Margin", [tag, f"{tag}/low", f"{tag}/high"]] for tag in reversed(AVERAGED) if tag in averages}
        board.add_custom_scalars({"Mean over seeds, 95 % interval": charts})

    return write


def write_against(variable: str, rows: Sequence[Row]) -> Write:
    """Final metrics of groups, the swept variable as the step."""

    def write(board: SummaryWriter) -> None:
        for row in rows:
            told = {f"final/{_labeled(name)}": row[name] for name in MEASURES if isinstance(row.get(name), float)}
            add_scalars(board, told, int(row[variable]))

    return write


def write_hyperparameters(point: Row, row: Row) -> Write:
    """One run as a session of the HParams page: its point of the grid, and all its metrics."""

    def write(board: SummaryWriter) -> None:
        metrics = {_labeled(name): float(row[name]) for name in MEASURES if isinstance(row.get(name), (int, float))}
        write_session(board, {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in point.items()})
        add_scalars(board, metrics, int(row.get("steps") or 0))

    return write


def write_columns(rows: Sequence[Row]) -> Write:
    """What the HParams page shows of all sessions, and in which order."""

    def write(board: SummaryWriter) -> None:
        from torch.utils.tensorboard.summary import hparams

        points: dict[str, Any] = {}
        for row in rows:
            points |= {
                k: v if isinstance(v, (int, float, str)) else str(v) for k, v in row.items() if k not in NO_POINT
            }
        metrics = {_labeled(name): 0.0 for name in COLUMNS if any(name in row for row in rows)}
        writer_of(board).add_summary(hparams(points, metrics)[0])  # type: ignore[no-untyped-call]

    return write


def write_pictures(figures: Sequence[Figure], mosaics: Sequence[Picture], tables: Mapping[str, str]) -> Write:
    """Figures and mosaics as images, what they show in words beside them, and tables as text."""

    def write(board: SummaryWriter) -> None:
        for name, text in tables.items():
            board.add_text(name, text)
        for figure in figures:
            _add_png(board, f"figures/{figure.name}", figure.png)
            board.add_text(f"figures/{figure.name}", figure.alt)
        for picture in mosaics:
            _add_png(board, f"samples/{named(picture.title)}", picture.png)
            board.add_text(f"samples/{named(picture.title)}", picture.alt)

    return write


def _labeled(name: str) -> str:
    return f"{name} (uses real data)" if name in METRIC_COLUMNS else name


def _add_png(board: SummaryWriter, tag: str, png: bytes) -> None:
    """A picture as it is: TensorBoard's own way goes through an array and compresses it again."""
    import io

    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(io.BytesIO(png)) as file:
        width, height = file.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    writer_of(board).add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), 0)


def numeric_variables(groups: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Swept fields with several whole numbers -> label of the other fields -> groups in rising order."""
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
