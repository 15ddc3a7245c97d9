"""Schedules: pure functions of the step."""

from __future__ import annotations

import math

GATE_START, GATE_END, GATE_ANNEAL_FRACTION = 0.5, 0.05, 0.8
"""First and last width of the smooth gates, in units of a layer's pre-activation scale, and the share of the steps in between."""
OWN_SCALE_ANNEAL_FRACTION = 0.6
FINAL_LR_FRACTION = 0.05


def annealed(fraction: float, step: int, steps: int) -> float:
    """Return the completed share at ``step`` (counted from 1) of an annealing over the first ``fraction`` of the steps; 1 for 0."""
    return min(1.0, (step - 1) / (fraction * steps)) if fraction else 1.0


def gate_width(step: int, steps: int) -> float:
    """gamma: geometric from ``GATE_START`` to ``GATE_END`` over the first ``GATE_ANNEAL_FRACTION`` of the steps (counted from 1)."""
    return float(GATE_START * (GATE_END / GATE_START) ** annealed(GATE_ANNEAL_FRACTION, step, steps))


def own_scale(step: int, steps: int) -> float:
    """Return p of ``residual_weights``: linear from 0 (``relative``) to 1 over the first ``OWN_SCALE_ANNEAL_FRACTION`` of the steps.

    With p = 1 from the first step, the G of tensors before a normalization outweighs all else a hundred times: samples never classify.
    """
    return annealed(OWN_SCALE_ANNEAL_FRACTION, step, steps)


def lr_factor(step: int, steps: int) -> float:
    """Return the learning-rate factor: a cosine from 1 to ``FINAL_LR_FRACTION``."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * cosine
