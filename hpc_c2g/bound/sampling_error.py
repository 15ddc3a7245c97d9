"""Sampling error of the KKT sum against the batch size, with its 1/B law and a concentration bound. Uses no data.

The loss uses G(B), a mean over a batch, for its expectation G. All norms here are those of the loss: ||u||^2 =
sum_k w_k e^(2 a (1 - lambda_k)) ||u_k||^2, where the left side has norm 1 (``relative`` weights), so that

    E L_stat(G(B)) = L_stat(G) + E||G(B) - E G(B)||^2 + ||d||^2 - 2 <left - G, d>,    d = E G(B) - G

and the squared error is the batch's contribution to the residual if every class has its share (d = 0). Law and bound hold for
independent samples (``bound/concentration.py``); lattices are compared with them. The bound's M is the largest deviation among
``reference_batch`` samples: a batch of B holds a larger one with probability B / (reference_batch + B) at most.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hpc_c2g.bound import concentration
from hpc_c2g.bound.config import CONFIDENCE, BoundConfig
from hpc_c2g.bound.moments import Moments, measure
from hpc_c2g.bound.summands import Summands, drawing
from hpc_c2g.distributed.environment import pick_device
from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically
from hpc_c2g.generators.latents import TRAINING_SCHEME
from hpc_c2g.training.results import load_run
from hpc_c2g.training.step.bundles import class_counts, load_bundles
from hpc_c2g.training.step.sharding import batch_shares


def sampling_error(config: BoundConfig, log_fn: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure every classifier of the run and write ``sampling_error.json`` into it; plain JSON, a function of the settings alone.

    Measures the first of several solutions of a classifier.

    Raises:
        UserError: the run is missing or has free images, a classifier is missing, or ``reference_batch`` is too small for the run.
    """
    device, run = pick_device(config.device), load_run(config.run_dir)
    bundles = load_bundles(run.config.members)
    batches = batch_shares(run.config, class_counts(bundles))
    results = []
    for k, folder in enumerate(run.config.classifiers):
        member = k * run.config.solutions
        bundle, own = bundles[member], batches[member]
        least = max(own, 2 * len(bundle.classes))
        if config.reference_batch < least:
            raise UserError(
                f"reference_batch={config.reference_batch} is too small for the run's batch of {own} samples and"
                f" {len(bundle.classes)} classes",
                f"give at least {least}, better a hundred times as much",
            )
        summands = Summands(run, bundle, member, device, config.micro_batch)
        results.append({"classifier": folder, **_measure(config, summands, own, f"classifier {k}", log_fn)})
    content = {
        "uses_real_data": False,
        "run_dir": config.run_dir,
        "step": run.step,
        "scheme": TRAINING_SCHEME,
        "confidence": CONFIDENCE,
        "settings": asdict(config),
        "classifiers": results,
    }
    write_atomically(Path(config.run_dir) / "sampling_error.json", json.dumps(content, indent=2).encode())
    return content


def _measure(
    config: BoundConfig, summands: Summands, own: int, name: str, log_fn: Callable[[str], None]
) -> dict[str, Any]:
    """Measure one member."""
    log_fn(f"{name}: expectation and covariance from {config.reference_batch} samples each")
    moments = measure(summands, config.reference_batch, config.seed)
    center = moments.center
    residual = float((summands.left - center).square().sum()) - moments.center_variance
    rows, schemes = [], list(dict.fromkeys(config.schemes))
    for scheme in schemes:
        for batch in sorted({*config.batches, own}):
            log_fn(f"{name}: {scheme}, {config.repeats} batches of {batch}")
            draw = drawing(scheme, summands.classes, batch, config.seed, summands.classifier)
            means = (summands.mean(draw(i)) for i in range(config.repeats))
            row = {"scheme": scheme, "batch": batch, "own": batch == own and scheme == TRAINING_SCHEME}
            rows.append(row | row_of(means, moments, summands.left, residual, scheme, batch))
    listed = [row for row in rows if row["batch"] in config.batches]
    return {
        "alpha": summands.alpha,
        "gate_width": summands.gamma,
        "period": summands.period,
        "reference": {
            "norm": float(center.norm()),
            "residual": residual,
            "error": math.sqrt(moments.center_variance),
            "deviation": math.sqrt(moments.within),
            "deviation_overall": math.sqrt(moments.overall),
            "reach": moments.reach,
            "reach_overall": moments.reach_overall,
            "batch_that_doubles_the_residual": moments.within / residual if residual > 0 else None,
        },
        "rows": rows,
        "exponents": {s: _exponents([r for r in listed if r["scheme"] == s]) for s in schemes},
    }


def row_of(
    means: Iterable[Tensor], moments: Moments, left: Tensor, residual: float, scheme: str, batch: int
) -> dict[str, Any]:
    """Errors of the KKT sums of some batches, beside the predictions for independent samples.

    The reference's own squared error is subtracted; an error of 0 is below the resolution of the reference.

    Args:
        means: G(B) ``[P]`` of at least two batches.
        moments: Reference moments.
        left: Left side ``[P]``.
        residual: L_stat(G).
        scheme: Drawing scheme of the batches.
        batch: B, the batch size.
    """
    center, (variance, reach, shift) = moments.center, moments.law(scheme, batch)
    squares, residuals = [], []
    for G in means:
        squares.append(float((G - center).square().sum()))
        residuals.append(float((left - G).square().sum()))
    error = math.sqrt(max(0.0, statistics.fmean(squares) - moments.center_variance))
    noise = math.hypot(statistics.stdev(squares) / math.sqrt(len(squares)), moments.center_variance)
    off = float(shift.square().sum())
    return {
        "error": error,
        "standard_error": noise / (2 * error) if error else 0.0,
        "relative_error": error / float(center.norm()),
        "predicted": math.sqrt(variance + off),
        "imbalance": math.sqrt(off),
        "quantile": math.sqrt(float(np.quantile(squares, CONFIDENCE))),
        "bound": concentration.bernstein_radius(variance, reach, batch, CONFIDENCE) + math.sqrt(off),
        "residual": statistics.fmean(residuals),
        "residual_bias": statistics.fmean(residuals) - residual,
        "residual_bias_predicted": variance + off - 2 * float((left - center) @ shift),
    }


def _exponents(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """Exponents of one scheme's measured and predicted errors; None with a single batch size or an error of 0."""
    if len(rows) < 2 or not all(row["error"] for row in rows):
        return None
    batches, errors = [row["batch"] for row in rows], [row["error"] for row in rows]
    measured, noise = concentration.exponent(batches, errors, [row["standard_error"] for row in rows])
    predicted, _ = concentration.exponent(batches, [row["predicted"] for row in rows], [0.0] * len(rows))
    return {"measured": measured, "standard_error": noise, "predicted": predicted}
