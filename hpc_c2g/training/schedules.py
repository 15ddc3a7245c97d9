"""What changes with the step, as pure functions of it."""

from __future__ import annotations

import math

from hpc_c2g.training.config import GateConfig, OptimiserConfig, StationarityConfig


def gate_width(config: GateConfig, step: int, steps: int) -> float:
    """gamma: geometric from start to end over the first ``anneal_fraction`` of the steps (counted from 1)."""
    progress = min(1.0, (step - 1) / max(1.0, config.anneal_fraction * steps))
    return float(config.start * (config.end / config.start) ** progress)


def own_scale(config: StationarityConfig, step: int, steps: int) -> float:
    """p of ``residual_weights``: linear from 0 (``relative``) to 1 over the first ``anneal_fraction`` of the steps.

    From the first step, G of what is before a normalisation outweighs all else a hundred times: samples never come to classify.
    """
    return min(1.0, (step - 1) / (config.anneal_fraction * steps)) if config.anneal_fraction else 1.0


def rate_factor(config: OptimiserConfig, step: int, steps: int) -> float:
    """Linear warm-up times cosine from 1 to ``final_fraction``."""
    warmup = min(1.0, step / max(1.0, config.warmup_fraction * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    return warmup * (config.final_fraction + (1 - config.final_fraction) * cosine)
