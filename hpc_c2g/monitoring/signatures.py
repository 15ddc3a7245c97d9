"""Signatures of failing runs, computed from their logged scalars alone: no data, no images, always the same verdict."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hpc_c2g.monitoring.curves import MEMBER

Line = Mapping[str, float]
"""Scalars of one logged step, as in metrics.jsonl."""

WINDOW = 10
"""Number of logged steps that a verdict depends on: one bad batch is no signature."""
GRACE = 0.2
"""Share of the steps, from the first on, without verdicts: the gates are wide and alpha has not settled."""
UTMOST = 1000.0
"""Largest level; higher ones are clipped."""

JUDGED = re.compile(rf"stationarity|gradient/generator|{MEMBER}(diversity|unsupported|roughness|saturation|class_mass)")


@dataclass(frozen=True)
class Signature:
    """One kind of failure.

    Attributes:
        name: Name of the signature.
        measure: Function from the lines of a window, the newest last, to the signature's scalar; NaN if they lack its inputs.
        threshold: Value at which the signature fires.
        above: True if it fires above the threshold, False if below.
        reason: Explanation of the threshold.
        advice: Fix, in one line.
    """

    name: str
    measure: Callable[[Sequence[Line]], float]
    threshold: float
    above: bool
    reason: str
    advice: str

    def level(self, lines: Sequence[Line]) -> float:
        """Return the measure relative to the threshold: it fires at 1 and more; at most ``UTMOST``, NaN if unknown."""
        value = self.measure(lines)
        if math.isnan(value):
            return value
        level = value / self.threshold if self.above else self.threshold / max(value, 1e-300)
        return min(level, UTMOST)


def judged(line: Line) -> dict[str, float]:
    """Return the scalars that the signatures depend on."""
    return {name: value for name, value in line.items() if JUDGED.fullmatch(name)}


def _worst(name: str, worst: Callable[[list[float]], float]) -> Callable[[Sequence[Line]], float]:
    """Return the measure: the median over the window of the worst classifier's scalar ``name``."""
    pattern = re.compile(rf"{MEMBER}{re.escape(name)}")

    def measure(lines: Sequence[Line]) -> float:
        values = [worst(own) for line in lines if (own := [v for k, v in line.items() if pattern.fullmatch(k)])]
        return statistics.median(values) if values else math.nan

    return measure


def _growth(lines: Sequence[Line]) -> float:
    """Return the largest value of the window's newer half over the median of its older half, of the residual or of the gradient's norm."""
    half, found = len(lines) // 2, []
    for name in ("stationarity", "gradient/generator"):
        values = [line[name] for line in lines if name in line]
        if half and len(values) == len(lines):
            found.append(max(values[half:]) / max(statistics.median(values[:half]), 1e-300))
    return max(found, default=math.nan)


SIGNATURES = (
    Signature(
        "mode_collapse",
        _worst("diversity", min),
        0.2,
        above=False,
        reason="the latents explain less than 4 % of the samples' variance (0.2 squared), the labels all the rest",
        advice="raise generator.codes, or lower optimizer.lr",
    ),
    Signature(
        "mode_invention",
        lambda lines: max(_worst("unsupported", max)(lines) / 0.5, _worst("stationarity", max)(lines)),
        1.0,
        above=True,
        reason="most samples lack multipliers or lie off the margin band by a factor 2, or together they explain the weights worse than"
        " none would (relative residual above 1): they satisfy no condition",
        advice="let alpha find its scale (alpha.init=null, alpha.max_change > 0), or raise duality.slackness",
    ),
    Signature(
        "instability",
        _growth,
        10.0,
        above=True,
        reason="the residual or the gradient is ten times what it was a few logged steps ago; it should fall",
        advice="lower optimizer.lr, or give optimizer.max_grad_norm",
    ),
    Signature(
        "poor_quality",
        lambda lines: max(_worst("roughness", max)(lines) / 0.8, _worst("saturation", max)(lines) / 0.95),
        1.0,
        above=True,
        reason="neighboring pixels correlate by less than 0.2 (roughness 0.8; noise has 1), or 95 % of the values are at an end of"
        " the box",
        advice="raise global_batch, add prior.total_variation, or try generator=conv",
    ),
    Signature(
        "starvation",
        _worst("class_mass", min),
        0.05,
        above=False,
        reason="a class gets less than a twentieth of its even share of the multipliers: the sum leaves it out",
        advice="lower optimizer.lr_multipliers, check that class's margins in the certificate, or raise its classifier's part of shares",
    ),
)
BY_NAME = {s.name: s for s in SIGNATURES}


def firing(line: Line) -> tuple[str, ...]:
    """Return the names of the signatures that fired at a logged step."""
    return tuple(s.name for s in SIGNATURES if line.get(f"alarm/{s.name}"))


def levels(lines: Sequence[Line]) -> dict[str, float]:
    """Return each signature's level over the newest lines; signatures with unknown levels are left out."""
    found = {s.name: s.level(lines[-WINDOW:]) for s in SIGNATURES}
    return {name: level for name, level in found.items() if not math.isnan(level)}
