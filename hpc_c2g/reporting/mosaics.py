"""Pictures of a group's best, median and worst run side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hpc_c2g.reporting.page import Picture
from hpc_c2g.reporting.results import Row

SIDE = 480
"""Largest side, in pixels, of one run's picture."""
GAP = 12


@dataclass(frozen=True)
class Ranked:
    """Best, median and worst run of a group.

    Attributes:
        by: Name of the metric that ranks the runs.
        runs: (rank, row) of the best, median and worst run; fewer if there are fewer runs.
    """

    by: str
    runs: list[tuple[str, Row]]


def ranked(rows: Sequence[Row]) -> Ranked:
    """Return the best, median and worst run by coverage (which uses real data), or by the residual if runs lack it."""
    by = "coverage" if all(_number(row, "coverage") for row in rows) else "stationarity"
    able = [row for row in rows if _number(row, by)]
    able.sort(key=lambda row: float(row[by]), reverse=by == "coverage")
    if not able:
        return Ranked(by, [])
    places = {0: "best", (len(able) - 1) // 2: "median", len(able) - 1: "worst"} if len(able) > 2 else {0: "best"}
    if len(able) == 2:
        places[1] = "worst"
    return Ranked(by, [(what, able[i]) for i, what in sorted(places.items())])


def _number(row: Row, name: str) -> bool:
    return isinstance(row.get(name), (int, float)) and math.isfinite(row[name])


def mosaic(label: str, chosen: Ranked, folders: dict[str, Path]) -> Picture | None:
    """Return the samples of the chosen runs in one picture; None if none of them has any.

    Args:
        label: Label of the group.
        chosen: Chosen runs of the group.
        folders: Folder of each run, by id.
    """
    pictures, captions = [], []
    for what, row in chosen.runs:
        try:
            with Image.open(folders[row["id"]] / "samples.png") as file:
                image = file.convert("RGB")
        except (OSError, ValueError, KeyError):
            continue
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        pictures.append(image)
        captions.append(f"{what} run {row['id']}, {chosen.by} {row[chosen.by]:.3g}")
    if not pictures:
        return None
    width = sum(image.width for image in pictures) + GAP * (len(pictures) - 1)
    whole = Image.new("RGB", (width, max(image.height for image in pictures)), "white")
    left = 0
    for image in pictures:
        whole.paste(image, (left, 0))
        left += image.width + GAP
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    order = "; ".join(captions)
    return Picture(label, f"Generated samples, a column per class, from left to right: {order}.", buffer.getvalue())
