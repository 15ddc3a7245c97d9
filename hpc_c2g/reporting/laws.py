"""Numbers and texts behind a study's figures: the lines of a sweep, intervals of means, fitted laws, best and worst rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from hpc_c2g.evaluation.metric_registry import METRICS, USES_REAL_DATA, Measure
from hpc_c2g.reporting.averages import CONFIDENCE
from hpc_c2g.reporting.results import NO_POINT

Row = Mapping[str, Any]
REST = "others"
NO_FIELDS = {"runs", *NO_POINT, *(f"{name}_sd" for name in NO_POINT)}


MEASURES: dict[str, Measure] = {
    m.name: m
    for m in (
        *METRICS,
        Measure("stationarity", "relative KKT residual", "low", "no data"),
        # the condition is the classifier's own, on the images that it was fitted to
        Measure("certificate", "certificate", "low", USES_REAL_DATA),
    )
}
"""Measures that figures show, by name: the metrics, the residual of the run and the certificate of its classifier."""


@dataclass(frozen=True)
class Law:
    """r(B) = limit + slope / B.

    Attributes:
        limit: Residual r_inf >= 0 of an infinite batch.
        slope: Coefficient c >= 0 of 1 / B.
        deviation: Largest |r / r(B) - 1| of the values that the law was fitted to.
        where: Batch size B of the largest deviation.
    """

    limit: float
    slope: float
    deviation: float
    where: float

    def __call__(self, batch: Any) -> Any:
        """Return r(B) for a number or an array."""
        return self.limit + self.slope / batch


def inverse_law(batches: Sequence[float], residuals: Sequence[float]) -> Law:
    """Fit the law by non-negative least squares of the relative deviations sum_i ((r_inf + c / B_i) / r_i - 1)^2.

    The deviations are relative because residuals that a figure shows on a logarithmic axis span decades.

    Args:
        batches: Batch sizes B > 0, at least two different ones.
        residuals: Residuals r > 0.
    """
    from scipy.optimize import nnls  # slow to import, and only this figure needs it

    B, r = np.asarray(batches, float), np.asarray(residuals, float)
    unit = B.min()  # both columns of one size, whatever B is counted in
    (limit, slope), _ = nnls(np.stack([1 / r, unit / (B * r)], 1), np.ones(len(r)))
    limit, slope = (0.0 if part < 1e-12 * r.max() else part for part in (limit, slope))  # rounding is no residual
    fitted = limit + slope * unit / B
    off = np.abs(r / fitted - 1)
    worst = int(off.argmax())
    return Law(float(limit), float(slope * unit), float(off[worst]), float(B[worst]))


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the least-squares slope of log y against log x; at least two different x, all positive."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def value(row: Row, name: str) -> float:
    """Return a measure as a number, NaN if the row lacks it."""
    found = row.get(name)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else math.nan


def finite_rows(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the rows in which a measure is a finite number."""
    return [row for row in rows if math.isfinite(value(row, name))]


def half_width(row: Row, name: str) -> float:
    """Return t s / sqrt(k), half of Student's 95 % confidence interval of the mean over k runs; NaN with one run or no deviation."""
    deviation, runs = value(row, f"{name}_sd"), value(row, "runs")
    if not (math.isfinite(deviation) and runs > 1):
        return math.nan
    return float(stdtrit(runs - 1, 0.5 + CONFIDENCE / 2) * deviation / math.sqrt(runs))


def swept(groups: Sequence[Row]) -> list[str]:
    """Return the fields that differ between groups, in the order in which they occur."""
    fields = dict.fromkeys(k for row in groups for k in row if k not in NO_FIELDS)
    return [f for f in fields if len({str(row[f]) for row in groups if f in row}) > 1]


def numeric(groups: Sequence[Row], field: str) -> bool:
    """Return True if every value of a field is a finite number."""
    return all(math.isfinite(value(row, field)) for row in groups if field in row)


def companions(groups: Sequence[Row], field: str) -> list[str]:
    """Return the other swept fields that have only one value at every value of ``field``: they distinguish no lines."""
    found = []
    for other in (f for f in swept(groups) if f != field):
        pairs = {(str(row[field]), str(row.get(other))) for row in groups if field in row}
        if len(pairs) == len({a for a, _ in pairs}):
            found.append(other)
    return found


def lines(groups: Sequence[Row], field: str) -> dict[str, list[Row]]:
    """Return the rows that have ``field``, a list per combination of the other swept fields, numbers in rising order."""
    rows = [row for row in groups if field in row]
    others = [f for f in swept(rows) if f != field and f not in companions(rows, field)]
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(", ".join(_setting(f, row.get(f), len(others) == 1) for f in others), []).append(row)
    if numeric(rows, field):
        found = {label: sorted(part, key=lambda row: value(row, field)) for label, part in found.items()}
    return found


def _setting(field: str, found: Any, alone: bool) -> str:
    return str(found) if alone and isinstance(found, str) else f"{field}={found}"


def number(found: float) -> str:
    """Return a number with three digits, without an exponent where possible."""
    if float(found).is_integer() and abs(found) < 1e7:
        return str(int(found))
    return f"{found:.0f}" if 1000 <= abs(found) < 1e7 else f"{found:.3g}"


def with_interval(row: Row, name: str) -> str:
    """Return value ± half the 95 % interval."""
    half = half_width(row, name)
    return number(value(row, name)) + (f" ± {number(float(f'{half:.2g}'))}" if math.isfinite(half) else "")


def plain(text: Any) -> str:
    """Return a text in one line, without characters that cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def extremes(measure: Measure, rows: Sequence[tuple[str, Row]]) -> str:
    """Return the best and the worst of rows with their places, as a sentence."""
    ranked = [(place, row) for place, row in rows if math.isfinite(value(row, measure.name))]
    keys = {"high": lambda v: -v, "low": lambda v: v, "one": lambda v: abs(v - 1)}
    ranked.sort(key=lambda pair: keys[measure.better](value(pair[1], measure.name)))
    (best, top), (worst, last) = ranked[0], ranked[-1]
    head = f"{measure.title[0].upper()}{measure.title[1:]} ({measure.source}; {measure.aim}): "
    if value(top, measure.name) == value(last, measure.name):
        return f"{head}{with_interval(top, measure.name)} throughout."
    return (
        f"{head}best {with_interval(top, measure.name)} at {best}, worst {with_interval(last, measure.name)} at {worst}"
    )


def trend(name: str, field: str, parts: Sequence[Sequence[Row]]) -> str:
    """Describe the change of a measure along the lines of a sweep; changes within its confidence intervals count as none."""
    counts: dict[str, int] = {}
    last = ""
    if len({value(row, name) for part in parts for row in finite_rows(part, name)}) < 2:
        return ""
    for part in parts:
        rows = finite_rows(part, name)
        if len(rows) < 2:
            continue
        first, end = rows[0], rows[-1]
        change = value(end, name) - value(first, name)
        noise = math.hypot(*(h for r in (first, end) if math.isfinite(h := half_width(r, name))))
        word = "changes no more than its intervals" if abs(change) <= noise else "rises" if change > 0 else "falls"
        counts[word] = counts.get(word, 0) + 1
        last = (
            f"from {number(value(first, name))} at {field}={number(value(first, field))}"
            f" to {number(value(end, name))} at {number(value(end, field))}"
        )
    if not counts:
        return ""
    if sum(counts.values()) == 1:
        return f"It {next(iter(counts))}, {last}."
    total = sum(counts.values())
    directions = ", ".join(f"{word} in {n}" for word, n in counts.items())
    return f"With {field}, of {total} lines it {directions}."
