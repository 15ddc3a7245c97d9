"""What changes with the step, as pure functions of it."""

from __future__ import annotations

import math

from hpc_c2g.training.config.objective import GateConfig, StationarityConfig
from hpc_c2g.training.config.train import OptimizerConfig


def annealed(fraction: float, step: int, steps: int) -> float:
    """Share that is done at ``step`` (counted from 1) of an annealing over the first ``fraction`` of the steps; 1 for a fraction of 0."""
    return min(1.0, (step - 1) / (fraction * steps)) if fraction else 1.0


def gate_width(config: GateConfig, step: int, steps: int) -> float:
    """gamma: geometric from start to end over the first ``anneal_fraction`` of the steps (counted from 1)."""
    return float(config.start * (config.end / config.start) ** annealed(config.anneal_fraction, step, steps))


def own_scale(config: StationarityConfig, step: int, steps: int) -> float:
    """p of ``residual_weights``: linear from 0 (``relative``) to 1 over the first ``anneal_fraction`` of the steps.

    From the first step, G of what is before a normalization outweighs all else a hundred times: samples never come to classify.
    """
    return annealed(config.anneal_fraction, step, steps)


def lr_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up times cosine from 1 to ``final_fraction``."""
    warmup = min(1.0, step / max(1.0, config.warmup_fraction * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    return warmup * (config.final_fraction + (1 - config.final_fraction) * cosine)
