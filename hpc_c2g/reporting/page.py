"""A study's report as one self-contained HTML file: no network, no second file. Every value is escaped."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_c2g.reporting.drawing import Figure

TEMPLATE = "page.html.j2"
Key = str | float | None
Cell = str | int | float | None | tuple[str, Key]
"""Value of a table's cell, or a pair of the value that is shown and the value that is sorted by."""


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort.

    Attributes:
        title: Heading of the table.
        caption: Description of the rows, and of what uses real data.
        columns: Names of the columns.
        rows: Cells of each row, one per column; the first names the row.
        numeric: True for each column of numbers, which is aligned to the right and sorted as numbers; empty if there are none.
    """

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: Sequence[bool] = ()

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows} | ({len(self.numeric)} if self.numeric else set())
        if widths - {len(self.columns)}:
            raise ValueError(f"table {self.title!r} has {len(self.columns)} columns, but rows or flags of {widths}")


@dataclass(frozen=True)
class Picture:
    """A mosaic of samples.

    Attributes:
        title: Heading of the picture.
        alt: Text alternative of the picture.
        png: PNG file, already as small as the page should be.
    """

    title: str
    alt: str
    png: bytes


@dataclass(frozen=True)
class Recipe:
    """Commands that repeat one run.

    Attributes:
        run: Id of the run.
        label: Point of the run in the grid.
        commands: Lines of a shell script.
    """

    run: str
    label: str
    commands: Sequence[str]


@dataclass(frozen=True)
class Page:
    """Content of the report; empty parts are left out.

    Attributes:
        title: Name of the study.
        about: Description in one line.
        generated: Time and source of the report.
        states: Number of tasks, by stage and state.
        notes: Warnings, such as runs that were left out and the reason.
        tables: Tables of results.
        figures: Drawn figures.
        mosaics: Pictures of samples.
        alarms: Table of the signatures of failure that fired in training.
        recipes: Commands that repeat each run.
        versions: Versions by package, and the machine.
    """

    title: str
    about: str = ""
    generated: str = ""
    states: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    mosaics: Sequence[Picture] = ()
    alarms: Table | None = None
    recipes: Sequence[Recipe] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def render(page: Page) -> str:
    """Return the whole page; the same content gives the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": _text, "key": _key, "uri": _uri}
    html = environment.get_template(TEMPLATE).render(page=page, states=_states(page.states), contents=_contents(page))
    return html.encode(
        "utf-8", "replace"
    ).decode()  # half a surrogate pair, such as from a file's name, cannot be encoded


def _states(states: Mapping[str, Mapping[str, int]]) -> Table | None:
    """Return a table with a row per stage, a column per state that occurs, and the sum."""
    if not states:
        return None
    columns = list(dict.fromkeys(state for counts in states.values() for state in counts))
    rows: list[list[Cell]] = [[stage, *(n.get(c, 0) for c in columns), sum(n.values())] for stage, n in states.items()]
    flags = [False, *([True] * (len(columns) + 1))]
    return Table("Progress", "Tasks of every stage by their state.", ["stage", *columns, "all"], rows, flags)


def _contents(page: Page) -> list[tuple[str, str]]:
    """Return (anchor, heading) of each section of the page."""
    sections = (
        ("notes", "Notes", page.notes),
        ("progress", "Progress", page.states),
        ("alarms", "Alarms", page.alarms and page.alarms.rows),
        ("tables", "Results", page.tables),
        ("figures", "Figures", page.figures),
        ("samples", "Samples", page.mosaics),
        ("recipes", "How to repeat each run", page.recipes),
        ("versions", "Versions", page.versions),
    )
    return [(anchor, heading) for anchor, heading, content in sections if content]


def _text(cell: Cell) -> str:
    shown = cell[0] if isinstance(cell, tuple) else cell
    if shown is None or (isinstance(shown, float) and math.isnan(shown)):
        return "–"
    return f"{shown:.4g}" if isinstance(shown, float) else str(shown)


def _key(cell: Cell) -> str:
    """Return the value that the page's script sorts by; empty, and last in any order, for an empty cell."""
    key: Any = cell[1] if isinstance(cell, tuple) else cell
    if key is None or (isinstance(key, float) and math.isnan(key)):
        return ""
    return repr(key).replace("inf", "Infinity") if isinstance(key, float) else str(key)


def _uri(picture: bytes | str) -> str:
    """Return a ``data:`` address of a PNG, or of the text of an SVG."""
    kind, content = ("svg+xml", picture.encode()) if isinstance(picture, str) else ("png", picture)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
