"""Scalars of a step that follow from each member's sums over its samples: ``STEP_SCALARS`` registers each with its curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hpc_c2g.monitoring.curves import CONDITIONS, GRADIENTS, LOSSES, MULTIPLIERS, Curve

Sums = Mapping[str, float]
"""Sums of one member by name: its weighted losses, ``sum_mu_m`` = sum mu m / S, ``sum_mu`` = sum mu / S, and ``gx`` and ``gmu``, the
squared norms of the cotangents of x and mu."""


@dataclass(frozen=True)
class StepScalar:
    """A scalar of a step.

    Attributes:
        name: Name of the scalar.
        function: Value from the member's sums and its alpha.
        curve: Chart of the scalar.
        mean: True if the mean over several members is logged too.
    """

    name: str
    function: Callable[[Sums, float], float]
    curve: Curve
    mean: bool = False


def rho(sums: Sums, alpha: float) -> float:
    """Return sum mu e^a m / sum mu: 1 at a KKT point."""
    return math.exp(alpha) * sums["sum_mu_m"] / max(sums["sum_mu"], 1e-300)


STEP_SCALARS = (
    StepScalar(
        "duality",
        lambda sums, alpha: sums["feasibility"] + sums.get("slackness", 0.0),
        Curve("duality", CONDITIONS, LOSSES, averaged=True, note="no data", logarithmic=True),
        mean=True,
    ),
    StepScalar("alpha", lambda sums, alpha: alpha, Curve("alpha", CONDITIONS, "alpha", averaged=True), mean=True),
    StepScalar(
        "rho",
        rho,
        Curve(
            "rho",
            CONDITIONS,
            "rho: sum mu e^a m / sum mu, 1 at a KKT point",
            averaged=True,
            note="no data · 1 where the KKT conditions hold",
        ),
        mean=True,
    ),
    StepScalar(
        "multiplier_sum",
        lambda sums, alpha: sums["sum_mu"],
        Curve("multiplier_sum", MULTIPLIERS, "sum of multipliers / S, 1 at a KKT point"),
        mean=True,
    ),
    StepScalar("gradient/x", lambda sums, alpha: math.sqrt(sums["gx"]), Curve("gradient/x", GRADIENTS, "norms")),
    StepScalar(
        "gradient/multipliers",
        lambda sums, alpha: math.sqrt(sums["gmu"]),
        Curve("gradient/multipliers", GRADIENTS, "norms"),
    ),
)
"""In the order of metrics.jsonl. To add a curve of a step, add its ``StepScalar``."""
