"""Figures of a study from its tables: quality, laws, speed, curves. Pure functions of plain rows; no file is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_c2g.monitoring.layout import LEARNING_CURVES
from hpc_c2g.reporting.averages import Average
from hpc_c2g.reporting.drawing import Figure, Panel, decades, figure, logarithmic, marks, short
from hpc_c2g.reporting.law_figures import batch_law, efficiency, sampling
from hpc_c2g.reporting.laws import Row, number
from hpc_c2g.reporting.quality_figures import LINES, against_category, against_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Figure",
    "against_category",
    "against_number",
    "batch_law",
    "efficiency",
    "figures",
    "learning_curves",
    "sampling",
]

CURVE_POINTS = 300
"""Number of points that a curve is drawn with at most."""
CURVE_PAGES = 4
"""Number of figures of learning curves at most: each takes a second to draw."""


def figures(
    groups: Sequence[Row],
    sampling_rows: Sequence[Row],
    averages: Mapping[str, Mapping[str, Average]],
    prediction: Mapping[int, float] | None = None,
) -> list[Figure]:
    """Return all figures that the tables allow, each under a name of its own.

    Args:
        groups: Means of each group of runs that only their seed sets apart.
        sampling_rows: Means of the sampling errors.
        averages: Mean curves by the group's label and the scalar's name.
        prediction: Predicted samples per second by number of nodes.
    """
    found = [
        *against_number(groups),
        *against_category(groups),
        *batch_law(groups),
        *sampling(sampling_rows),
        *efficiency(groups, prediction),
        *learning_curves(averages, list(LEARNING_CURVES)),
    ]
    names: dict[str, int] = {}
    for k, one in enumerate(found):
        names[one.name] = names.get(one.name, 0) + 1
        if names[one.name] > 1:
            found[k] = replace(one, name=f"{one.name}-{names[one.name]}")
    return found


def learning_curves(averages: Mapping[str, Mapping[str, Average]], tags: Sequence[str]) -> list[Figure]:
    """Return figures of mean curves with their intervals as bands, a panel per tag, a line per group.

    A figure has eight groups at most, and there are ``CURVE_PAGES`` figures at most.

    Args:
        averages: Averages over seeds by the group's label and the tag.
        tags: Tags to draw, in this order; those that no group has are left out.
    """
    found: list[Figure] = []
    kept = {label: cut for label, one in averages.items() if (cut := {t: _finite(one[t]) for t in tags if t in one})}
    kept = {label: cut for label, one in kept.items() if (cut := {t: a for t, a in one.items() if len(a.steps)})}
    pages, groups = -(-len(kept) // LINES), len(kept)
    pages = min(pages, CURVE_PAGES)
    for page in range(pages):
        here = dict(list(kept.items())[page * LINES : (page + 1) * LINES])
        present = [t for t in tags if any(t in one for one in here.values())]
        of = f" ({page + 1} of {pages})" if pages > 1 else ""
        words = [f"Curves over training steps{of}: means over seeds, bands are Student's 95 % intervals."]
        if groups > pages * LINES:
            words.append(f"The first {pages * LINES} of {groups} settings are drawn; TensorBoard has the means of all.")
        words += [_summary(t, here) for t in present]
        panels = [
            Panel(t, LEARNING_CURVES[t].note if t in LEARNING_CURVES else "no data", _curves(t, here)) for t in present
        ]
        name = "learning_curves" if page == 0 else f"learning_curves-{page + 1}"
        found.append(figure(name, f"Learning curves{of}", " ".join(words), panels))
    return found


def _finite(a: Average) -> Average:
    kept = np.flatnonzero(np.isfinite(a.mean) & np.isfinite(a.low) & np.isfinite(a.high))
    if len(kept) > CURVE_POINTS:
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, CURVE_POINTS).round().astype(int))]
    return Average(a.steps[kept], a.mean[kept], a.low[kept], a.high[kept], a.runs[kept])


def _summary(tag: str, here: Mapping[str, Mapping[str, Average]]) -> str:
    ends = [(label, one[tag]) for label, one in here.items() if tag in one]
    ends.sort(key=lambda pair: float(pair[1].mean[-1]))
    parts = [
        f"{f'{label}: ' if label else ''}from {number(a.mean[0])} to {number(a.mean[-1])} at step {a.steps[-1]}"
        for label, a in (ends if len(ends) < 3 else (ends[0], ends[-1]))
    ]
    return f"{tag}{', lowest and highest end' if len(ends) > 2 else ''}: {'; '.join(parts)}."


def _curves(tag: str, here: Mapping[str, Mapping[str, Average]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        means = [float(v) for one in here.values() if tag in one for v in one[tag].mean]
        log = tag in LEARNING_CURVES and LEARNING_CURVES[tag].logarithmic and logarithmic(means, 3)
        for k, (label, one) in enumerate(here.items()):
            if tag in one:
                a, every = one[tag], max(1, len(one[tag].steps) // 7)
                low = np.maximum(a.low, min(means) / 2) if log else a.low
                look: dict[str, Any] = marks(k) | {"markevery": (k * every // len(here), every), "markersize": 4.5}
                axes.fill_between(a.steps, low, a.high, color=look["color"], alpha=0.18, linewidth=0)
                axes.plot(a.steps, a.mean, label=short(label) if len(here) > 1 else None, **look)
        if log:
            decades(axes)
        axes.set_xlabel("step")

    return paint
