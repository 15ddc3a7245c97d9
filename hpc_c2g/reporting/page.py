"""A study's report as one HTML file that needs nothing else: no network, no second file. Every value is escaped."""

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
"""What is shown, or a pair of that and what is sorted by."""


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort.

    Attributes:
        title: its heading.
        caption: what the rows are, and what of it uses real data.
        columns: names.
        rows: as many cells each; the first names the row.
        numeric: which columns are numbers, set to the right and sorted as such; empty where none is.
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
        title: what it is.
        alt: what is to be seen.
        png: as small as the caller wants the page to be.
    """

    title: str
    alt: str
    png: bytes


@dataclass(frozen=True)
class Recipe:
    """How to repeat one run.

    Attributes:
        run: its id.
        label: its point in the grid.
        commands: lines of a shell.
    """

    run: str
    label: str
    commands: Sequence[str]


@dataclass(frozen=True)
class Page:
    """Everything that the report tells; what is empty is left out.

    Attributes:
        title: the study's name.
        about: one line.
        generated: when, from what.
        states: stage -> state -> how many tasks.
        notes: warnings, such as runs that were left out and why.
        tables: of results.
        figures: drawn ones.
        mosaics: pictures of samples.
        alarms: what went wrong while training.
        recipes: how to repeat each run.
        versions: package or machine -> version.
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
    """The whole page; the same content gives the same text."""
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
    return html.encode("utf-8", "replace").decode()  # half a surrogate pair, from a file's name, say, is no text


def _states(states: Mapping[str, Mapping[str, int]]) -> Table | None:
    """A row per stage, a column per state that any has, and their sum."""
    if not states:
        return None
    columns = list(dict.fromkeys(state for counts in states.values() for state in counts))
    rows: list[list[Cell]] = [[stage, *(n.get(c, 0) for c in columns), sum(n.values())] for stage, n in states.items()]
    flags = [False, *([True] * (len(columns) + 1))]
    return Table("Progress", "Tasks of every stage by their state.", ["stage", *columns, "all"], rows, flags)


def _contents(page: Page) -> list[tuple[str, str]]:
    """(anchor, heading) of the sections there are."""
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
    """What the page's script sorts by; empty, and last whatever the order, where there is nothing."""
    key: Any = cell[1] if isinstance(cell, tuple) else cell
    if key is None or (isinstance(key, float) and math.isnan(key)):
        return ""
    return repr(key).replace("inf", "Infinity") if isinstance(key, float) else str(key)


def _uri(picture: bytes | str) -> str:
    """A ``data:`` address of a PNG, or of the text of an SVG."""
    kind, content = ("svg+xml", picture.encode()) if isinstance(picture, str) else ("png", picture)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
