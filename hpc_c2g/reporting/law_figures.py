"""Figures of laws: the residual against the global batch, the error of the KKT sum, speed against nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_c2g.reporting import laws
from hpc_c2g.reporting.drawing import (
    DASHES,
    FAINT,
    INK,
    Figure,
    Panel,
    decades,
    figure,
    logarithmic,
    marks,
    short,
    ticks,
)
from hpc_c2g.reporting.laws import MEASURES, Law, Row, finite_rows, half_width, number, value
from hpc_c2g.reporting.quality_figures import INTERVALS, LINES, PAPER, against, bars, legend_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPEED = "samples_per_second"
NO_PREDICTION = "No prediction is drawn: `c2g plan ... out=DIR/plan.json` makes one, DIR being the study's folder."


def batch_law(groups: Sequence[Row]) -> list[Figure]:
    """Return the figure of the residual against the global batch with the law r(B) = r_inf + c / B, and of the coverage."""
    if "global_batch" not in laws.swept(groups) or not laws.numeric(groups, "global_batch"):
        return []
    field, residual = "global_batch", MEASURES["stationarity"]
    fitted: dict[str, tuple[list[Row], Law]] = {}
    for label, part in laws.lines(groups, field).items():
        rows = [r for r in finite_rows(part, residual.name) if value(r, residual.name) > 0 and value(r, field) > 0]
        if len(rows) >= 3:
            law = laws.inverse_law([value(r, field) for r in rows], [value(r, residual.name) for r in rows])
            fitted[label] = rows, law
    if not fitted:
        return []
    shown = dict(list(fitted.items())[:LINES])
    sentences = [f"The relative KKT residual against the global batch B with the law r(B) = r_inf + c / B. {INTERVALS}"]
    for label, (_, law) in shown.items():
        sentences.append(
            f"{f'{label}: ' if label else ''}r_inf = {number(law.limit)}, c = {number(law.slope)}, largest relative"
            f" deviation {100 * law.deviation:.0f} % at B={number(law.where)}."
        )
    if len(fitted) > len(shown):
        sentences.append(f"The first {len(shown)} of {len(fitted)} lines are drawn.")

    names = {
        label: f"{f'{short(label, 34)}: ' if label else 'law: '}{number(law.limit)} + {number(law.slope)} / B"
        for label, (_, law) in shown.items()
    }

    def paint(axes: Axes) -> None:
        every = [value(r, field) for rows, _ in shown.values() for r in rows]
        for k, (label, (rows, law)) in enumerate(shown.items()):
            x = np.geomspace(min(every), max(every), 100)
            look = marks(k)
            axes.plot([], [], label=names[label], **look)
            axes.plot(x, law(x), color=look["color"], linestyle=look["linestyle"], zorder=2)
            bars(axes, [value(r, field) for r in rows], rows, residual.name, **{**look, "linestyle": "none"})
        ticks(axes, every, logarithmic(every, 3))
        decades(axes)
        axes.set_xlabel(PAPER[field])

    panels = [Panel(residual.title, f"{residual.source} · lines: r_inf + c / B", paint)]
    covered = {label: finite_rows(rows, "coverage") for label, (rows, _) in shown.items()}
    if any(covered.values()):
        coverage = MEASURES["coverage"]
        panels.append(
            Panel(
                coverage.title,
                coverage.note,
                against(coverage, field, {names[k]: rows for k, rows in covered.items()}, 3),
            )
        )
        places = [(f"B={r[field]}{f' ({k})' if k else ''}", r) for k, rows in covered.items() for r in rows]
        sentences.append(laws.extremes(coverage, places) + ".")
    return [figure("batch_law", "Residual against the global batch: r_inf + c / B", " ".join(sentences), panels, 3.2)]


def sampling(rows: Sequence[Row]) -> list[Figure]:
    """Return the figure of the error of the KKT sum G(B) against the batch: a panel per classifier, a line per scheme.

    All values are norms, not squared, in the norm of the loss, where the left side has 1 (``training/sampling_error.py``):

    - ``error`` sqrt(E||G(B) - G||^2) over the batches drawn, whose square is what a batch adds to the residual;
    - ``predicted`` the error of independent samples, sqrt(trace of the covariance / B), plus the term of unequal shares of the classes;
    - ``quantile`` the 95 % quantile of the measured ||G(B) - G||;
    - ``bound`` Bernstein's radius, which ||G(B) - G|| of independent samples exceeds with a probability of 5 % at most.

    Rows are those of ``results.bound_groups``: means over runs.
    """
    kept = finite_rows(rows, "error")
    if not kept:
        return []
    classifiers = list(dict.fromkeys(row["classifier"] for row in kept))
    schemes = list(dict.fromkeys(str(row["scheme"]) for row in kept))
    several = len(classifiers) > 1
    sentences = [
        "Root-mean-square error of the KKT sum over a batch of B samples, in units of the norm of the left side (not squared; its"
        " square adds to the residual), on two logarithmic axes."
    ]
    panels = []
    for k in classifiers:
        parts = {s: _scheme(kept, k, s) for s in schemes}
        sentences += [_sampled(f"classifier {k}, {s}" if several else s, part) for s, part in parts.items() if part]
        title = f"classifier {k}" if several else "error of G(B)"
        panels.append(Panel(title, "norm of the left side = 1 · no data", _errors(parts)))
    return [figure("sampling", "Error of the KKT sum against the batch size", " ".join(sentences), panels, 3.4)]


def _scheme(rows: Sequence[Row], classifier: Any, scheme: str) -> list[Row]:
    found = [r for r in rows if r["classifier"] == classifier and str(r["scheme"]) == scheme]
    return sorted(found, key=lambda r: value(r, "batch"))


def _sampled(name: str, rows: Sequence[Row]) -> str:
    """Describe the errors of a scheme in up to three sentences."""
    best, worst = min(rows, key=lambda r: value(r, "error")), max(rows, key=lambda r: value(r, "error"))
    sentences = [
        f"{name}: largest {number(worst['error'])} at B={worst['batch']}, smallest {number(best['error'])} at B={best['batch']}"
    ]
    seen = [r for r in rows if value(r, "error") > 0]
    if len({r["batch"] for r in seen}) > 1:
        sentences.append(f", slope {laws.exponent([r['batch'] for r in seen], [r['error'] for r in seen]):.2f}")
    ratios = [value(r, "error") / value(r, "predicted") for r in rows if value(r, "predicted") > 0]
    if ratios:
        sentences.append(
            f", {number(min(ratios))} to {number(max(ratios))} times the 1/sqrt(B) law of independent samples"
        )
    over = [r["batch"] for r in rows if value(r, "quantile") > value(r, "bound")]
    if finite_rows(rows, "quantile") and finite_rows(rows, "bound"):
        sentences.append(f"; 95 % quantile {f'above the bound at B={over}' if over else 'below the bound throughout'}")
    if len(seen) < len(rows):
        sentences.append(f"; {len(rows) - len(seen)} too small to be measured, not drawn")
    return "".join(sentences) + "."


def _errors(parts: Mapping[str, list[Row]]) -> Callable[[Axes], None]:
    yardstick = next((s for s in ("independent", *parts) if parts.get(s)), "")

    def paint(axes: Axes) -> None:
        every = [value(r, "batch") for rows in parts.values() for r in rows]
        for name, line, text in (
            ("bound", DASHES[3], "95 % bound"),
            ("quantile", DASHES[2], "95 % quantile, measured"),
            ("predicted", "-", "1/√B law"),
        ):
            rows = [r for r in finite_rows(parts[yardstick], name) if value(r, name) > 0]
            label = f"{text} ({yardstick})"
            axes.plot([r["batch"] for r in rows], [r[name] for r in rows], color=INK, linestyle=line, label=label)
        for k, (scheme, rows) in enumerate(parts.items()):
            seen = [r for r in rows if value(r, "error") > 0]
            look = marks(k) | {"linestyle": "none", "zorder": 4}
            axes.plot(
                [r["batch"] for r in seen], [r["error"] for r in seen], label=f"{short(scheme)}, measured", **look
            )
        ticks(axes, every, min(every) > 0 and max(every) > min(every))
        decades(axes)
        axes.set_xlabel("batch size B")

    return paint


def efficiency(groups: Sequence[Row], prediction: Mapping[int, float] | None = None) -> list[Figure]:
    """Return the figure of samples per second and efficiency against nodes: measured, ideal, and as planned.

    Efficiency is speed per node over that of the fewest nodes; its interval is that of a quotient of independent means, to first order.

    Args:
        groups: Rows of groups with a swept field ``nodes``.
        prediction: Predicted samples per second, by number of nodes.
    """
    if "nodes" not in laws.swept(groups) or not laws.numeric(groups, "nodes"):
        return []
    parts = {}
    for label, part in laws.lines(groups, "nodes").items():
        rows = [r for r in finite_rows(part, SPEED) if value(r, SPEED) > 0 and value(r, "nodes") > 0]
        if len(rows) > 1:
            parts[label] = rows
    if not parts:
        return []
    sentences = [
        f"Samples per second and efficiency (speed per node over that of the fewest nodes) against nodes. {INTERVALS}"
    ]
    for label, rows in parts.items():
        gained = [
            f"{number(value(r, 'nodes'))}: {laws.with_interval(r, SPEED)} ({100 * e:.0f} %)" for r, e in _gains(rows)
        ]
        sentences.append(f"{f'{label}, n' if label else 'N'}odes: samples per second (efficiency) {', '.join(gained)}.")
    if len(parts) > LINES:
        sentences.append(f"{len(parts) - LINES} of {len(parts)} lines are drawn faintly.")
    planned: list[Row] = [{"nodes": n, SPEED: s} for n, s in sorted((prediction or {}).items()) if n > 0 and s > 0]
    if planned:
        foreseen = [f"{r['nodes']}: {number(r[SPEED])} ({100 * e:.0f} %)" for r, e in _gains(planned)]
        sentences.append(f"Predicted by the plan: {', '.join(foreseen)}.")
    else:
        sentences.append(NO_PREDICTION)
    panels = [
        Panel("samples per second", "measured · higher is better", _speeds(parts, planned)),
        Panel("efficiency", "speed per node, over the fewest nodes'", _efficiencies(parts, planned)),
    ]
    return [figure("efficiency", "Speed against nodes", " ".join(sentences), panels, 3.0)]


def _gains(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    base = value(rows[0], SPEED) / value(rows[0], "nodes")
    return [(r, value(r, SPEED) / value(r, "nodes") / base) for r in rows]


def _speeds(parts: Mapping[str, list[Row]], planned: Sequence[Row]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        x = [value(r, "nodes") for rows in (*parts.values(), planned) for r in rows]
        for k, (label, rows) in enumerate(parts.items()):
            ends = np.array([value(rows[0], "nodes"), max(x)])
            ideal = "ideal: in step with nodes" if k == 0 else None
            axes.plot(ends, value(rows[0], SPEED) * ends / ends[0], color=FAINT, linewidth=1, label=ideal, zorder=0)
            name = legend_label(k, label or "measured", len(parts), LINES)
            bars(axes, [value(r, "nodes") for r in rows], rows, SPEED, label=name, **marks(k))
        if planned:
            at, speeds = [r["nodes"] for r in planned], [r[SPEED] for r in planned]
            axes.plot(at, speeds, color=INK, linestyle=DASHES[2], marker="+", label="predicted by the plan", zorder=2)
        ticks(axes, x, logarithmic(x, 3))
        decades(axes)
        axes.set_xlabel("nodes")

    return paint


def _efficiencies(parts: Mapping[str, list[Row]], planned: Sequence[Row]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        x = [value(r, "nodes") for rows in (*parts.values(), planned) for r in rows]
        axes.axhline(1, color=FAINT, linewidth=1, zorder=0)
        for k, rows in enumerate(parts.values()):
            relative = [half_width(r, SPEED) / value(r, SPEED) for r in rows]
            halves = [
                0.0,
                *(e * np.hypot(q, relative[0]) for (_, e), q in zip(_gains(rows)[1:], relative[1:], strict=True)),
            ]
            gains = [e for _, e in _gains(rows)]
            axes.errorbar([value(r, "nodes") for r in rows], gains, yerr=halves, elinewidth=1.1, **marks(k))
        if planned:
            gains = [e for _, e in _gains(planned)]
            axes.plot([r["nodes"] for r in planned], gains, color=INK, linestyle=DASHES[2], marker="+", zorder=2)
        ticks(axes, x, logarithmic(x, 3))
        axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))
        axes.set_xlabel("nodes")

    return paint
