"""The list of all curves of a run, and TensorBoard's custom layout that derives from it: charts by question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hpc_c2g.monitoring.curves import CONDITIONS, GRADIENTS, LOSSES, SIGNATURES, SPEED, Curve
from hpc_c2g.monitoring.sample_metrics import SAMPLE_METRICS
from hpc_c2g.monitoring.step_scalars import STEP_SCALARS

CURVES = (
    Curve(
        "stationarity",
        CONDITIONS,
        "relative residual",
        members=False,
        averaged=True,
        note="relative KKT residual, no data",
        logarithmic=True,
    ),
    Curve(
        r"((classifier|solution)\d+/)+stationarity",
        CONDITIONS,
        "relative residual per classifier and solution",
        members=False,
    ),
    Curve("stationarity/.+", CONDITIONS, "relative residual per tensor"),
    Curve("loss", CONDITIONS, LOSSES, averaged=True, note="training loss, no data", logarithmic=True),
    *(scalar.curve for scalar in STEP_SCALARS),
    *(metric.curve for metric in SAMPLE_METRICS),
    Curve("signature/.+", SIGNATURES, "level, 1 fires", members=False),
    Curve("alarm/.+", SIGNATURES, "firing, 1 or 0", members=False),
    Curve("gradient/generator", GRADIENTS, "norms", members=False, averaged=True),
    Curve("samples_per_second", SPEED, "samples per second", members=False, averaged=True),
    Curve("time/(?!slowest).+", SPEED, "share of time", members=False),
    Curve("time/slowest.+", SPEED, "slowest rank", members=False),
    Curve("wire/(seconds|hidden)", SPEED, "residual all-reduce", members=False),
    Curve("wire/bytes", SPEED, "residual all-reduce, bytes", members=False),
    Curve("memory/.+", SPEED, "peak memory, GiB", members=False),
)
"""Every curve of a run except its weighted losses; those of samples and of a step's sums are registered with them."""

AVERAGED = tuple(curve.scalar for curve in CURVES if curve.averaged)
"""Names of the scalars whose means over seeds a study charts."""

LEARNING_CURVES = {curve.scalar: curve for curve in CURVES if curve.note}
"""Curves that a study draws as a figure, by the name of their scalar."""

Layout = dict[str, dict[str, list[Any]]]


def layout(prefixes: Sequence[str], losses: Sequence[str]) -> Layout:
    """TensorBoard's custom layout of a run: kind and patterns of each chart, by category and title.

    Args:
        prefixes: Prefixes of the members' curves: ``[""]`` for one, ``["classifier0/", ...]`` or ``["solution0/", ...]`` for several.
        losses: Names of the weighted losses, which are charted beside their sum.
    """
    found: Layout = {}
    for curve in (*CURVES, *(Curve(re.escape(name), CONDITIONS, LOSSES) for name in losses)):
        charts = found.setdefault(curve.category, {})
        if curve.quantiles:
            charts |= _bands(curve, prefixes)
        else:
            charts.setdefault(curve.chart, ["Multiline", []])[1].append(curve.pattern)
    return found


def _bands(curve: Curve, prefixes: Sequence[str]) -> dict[str, list[Any]]:
    """Return charts of a median in its bands, one set per member and, for several members, one of their means."""
    return {
        f"{prefix}{curve.chart}: median in {low} to {high} %": [
            "Margin",
            [f"{prefix}{curve.name}/q50", f"{prefix}{curve.name}/q{low:02d}", f"{prefix}{curve.name}/q{high}"],
        ]
        for prefix in dict.fromkeys(["", *prefixes])
        for low, high in ((5, 95), (25, 75))
    }
