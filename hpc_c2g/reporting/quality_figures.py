"""Figures of quality: every measure against the swept fields.

Rows are those of ``results.groups``: means over runs that differ in their seed only, with standard deviations. Every interval is
Student's 95 % interval of the mean. oracle, transfer, proximity, coverage, diversity and the certificate *use real data*, after
training, and are marked so in the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpc_c2g.evaluation.metric_registry import Measure
from hpc_c2g.reporting import laws
from hpc_c2g.reporting.drawing import COLORS, FAINT, Figure, Panel, decades, figure, logarithmic, marks, short, ticks
from hpc_c2g.reporting.laws import MEASURES, REST, Row, finite_rows, half_width, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES, DOTS, CATEGORIES = 8, 6, 24
"""Largest number of lines of a panel, of markers of a row, and of rows of a figure."""
PAPER = {"global_batch": "global batch B", "data.train_size": "training images (data.train_size)"}
INTERVALS = "Error bars: Student's 95 % interval of the mean over seeds."


def against_number(groups: Sequence[Row]) -> list[Figure]:
    """Return figures of every measure against each swept field of numbers, a line per combination of the other fields."""
    found = []
    for field in laws.swept(groups):
        if not laws.numeric(groups, field):
            continue
        parts = laws.lines(groups, field)
        present = _present([row for part in parts.values() for row in part])
        if present:
            panels = [Panel(m.title, m.note, against(m, field, parts)) for m in present]
            title = f"Quality against {PAPER.get(field, field)}"
            alt = _alt(title, present, groups, field, parts, LINES)
            found.append(figure(f"quality-{field}", title, alt, panels))
    return found


def against_category(groups: Sequence[Row]) -> list[Figure]:
    """Return figures of every measure at each value of a swept field of words: a row per value, a marker per combination of the others."""
    found = []
    for field in laws.swept(groups):
        if laws.numeric(groups, field):
            continue
        rows = [row for row in groups if field in row]
        names = list(dict.fromkeys(str(row[field]) for row in rows))
        for k in range(0, len(names), CATEGORIES):
            chosen = names[k : k + CATEGORIES]
            here = [row for row in rows if str(row[field]) in chosen]
            parts, present = laws.lines(here, field), _present(here)
            if present:
                panels = [Panel(m.title, m.note, _dots(m, field, chosen, parts)) for m in present]
                title = f"Quality of each {field}"
                alt = _alt(title, present, here, field, parts, DOTS)
                height = max(1.4, 0.27 * len(chosen) * max(1.0, 0.45 * min(len(parts), DOTS)))
                name = f"quality-{field}" if k == 0 else f"quality-{field}-{k // CATEGORIES + 1}"
                found.append(figure(name, title, alt, panels, height))
    return found


def _present(rows: Sequence[Row]) -> list[Measure]:
    """Return the measures that at least one row has; the certificate, which no generator changes, only if it differs."""
    found = [m for m in MEASURES.values() if finite_rows(rows, m.name)]
    return [m for m in found if m.name != "certificate" or len({row.get(m.name) for row in rows}) > 1]


def _alt(
    title: str, present: Sequence[Measure], groups: Sequence[Row], field: str, parts: Mapping[str, list[Row]], most: int
) -> str:
    places = [(f"{field}={row[field]}{f' ({label})' if label else ''}", row) for label, p in parts.items() for row in p]
    sentences = [f"{title}; {len(present)} panel{'s' if len(present) > 1 else ''}, {len(places)} settings. {INTERVALS}"]
    if len(parts) > most:
        sentences.append(
            f"{len(parts) - most} of {len(parts)} combinations of the other fields are drawn faintly as {REST}."
        )
    if fixed := laws.companions([row for row in groups if field in row], field):
        sentences.append(f"Note that {', '.join(fixed)} changes along with {field}.")
    for m in present:
        sentences.append(laws.extremes(m, places).rstrip(".") + ".")
        if laws.numeric(groups, field):
            sentences.append(laws.trend(m.name, field, list(parts.values())))
    return " ".join(t for t in sentences if t)


def legend_label(k: int, label: str, count: int, most: int) -> str | None:
    """Return the name of the k-th line in the legend; all beyond ``most`` share one."""
    if k < most:
        return short(label) if label else None
    return f"{count - most} {REST}" if k == most else None


def bars(axes: Axes, where: Any, rows: Sequence[Row], name: str, flat: bool = False, **look: Any) -> None:
    """Draw means with their intervals; a single run has no bar, nor do faint lines."""
    means, halves = [value(r, name) for r in rows], [half_width(r, name) for r in rows]
    if look["color"] == FAINT:
        halves = [math.nan] * len(rows)
    if flat:
        drawn = axes.errorbar(means, where, xerr=halves, elinewidth=1.1, **look)
    else:
        drawn = axes.errorbar(where, means, yerr=halves, elinewidth=1.1, **look)
    for part in (*drawn.lines[1], *drawn.lines[2]):
        part.set_alpha(0.7)  # a bar hides no marker of another line


def against(m: Measure, field: str, parts: Mapping[str, list[Row]], least: float = 10) -> Callable[[Axes], None]:
    """Return the function that draws a measure against a field of numbers, a line per part; logarithmic beyond a factor ``least``."""

    def paint(axes: Axes) -> None:
        rows = [row for part in parts.values() for row in finite_rows(part, m.name)]
        x = [value(row, field) for part in parts.values() for row in part]
        log, drawn = logarithmic(x, least), min(len(parts), LINES)
        step = 0.012 * (math.log(max(x) / min(x)) if log else max(x) - min(x))
        for k, (label, part) in enumerate(parts.items()):
            kept = finite_rows(part, m.name)
            aside = step * (k - (drawn - 1) / 2) if k < drawn else 0.0  # bars of several lines side by side
            at = [value(r, field) * math.exp(aside) if log else value(r, field) + aside for r in kept]
            name = legend_label(k, label, len(parts), LINES)
            if kept:
                bars(axes, at, kept, m.name, label=name, **marks(k))
        ticks(axes, x, log)
        axes.set_xlabel(short(PAPER.get(field, field)))
        _range(axes, m, rows)

    return paint


def _dots(m: Measure, field: str, names: Sequence[str], parts: Mapping[str, list[Row]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        drawn = min(len(parts), DOTS)
        for k, (label, part) in enumerate(parts.items()):
            rows = finite_rows(part, m.name)
            aside = 0.7 * ((k + 0.5) / drawn - 0.5) if k < drawn else 0.0
            at = [names.index(str(r[field])) + aside for r in rows]
            look = marks(k if k < DOTS else len(COLORS)) | {"linestyle": "none"}
            if rows:
                bars(axes, at, rows, m.name, True, label=legend_label(k, label, len(parts), DOTS), **look)
        axes.set_ylim(len(names) - 0.4, -0.6)
        first = axes.get_subplotspec()
        axes.set_yticks(range(len(names)), [short(n, 26) for n in names] if first and first.is_first_col() else [])
        axes.tick_params("y", length=0)
        _range(axes, m, [row for part in parts.values() for row in finite_rows(part, m.name)], "x")

    return paint


def _range(axes: Axes, m: Measure, rows: Sequence[Row], which: str = "y") -> None:
    """Set the axis range: shares stay within 0..1, a residual that spans much is logarithmic, real images have a line."""
    values = [value(row, m.name) for row in rows]
    (low, high), put = (axes.get_ylim(), axes.set_ylim) if which == "y" else (axes.get_xlim(), axes.set_xlim)
    if m.name in ("proximity", "diversity") and low < 1 < high:
        (axes.axhline if which == "y" else axes.axvline)(1, color=FAINT, linestyle=":", linewidth=1.2, zorder=0)
    if m.better == "low" and m.name != "proximity" and logarithmic(values, 3):
        bars = [value(r, m.name) - half_width(r, m.name) for r in rows]
        least = min([*values, *(b for b in bars if b > min(values) / 2)])
        put(least / 1.15, max([*values, *(value(r, m.name) + half_width(r, m.name) for r in rows)]) * 1.15)
        decades(axes, which)
    elif m.name.endswith("accuracy") or m.name == "coverage":
        put(max(low, -0.03), min(high, 1 + 0.06 * (1 - max(low, 0.0))))
    else:
        put(max(low, 0.0), high)
