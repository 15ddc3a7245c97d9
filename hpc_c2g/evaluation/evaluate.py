"""Evaluation of a trained generator against real data, beside its baselines, after training: this module *uses real data*."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_c2g import markdown
from hpc_c2g.classifiers.bundle import load_bundle
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.dataset import Split
from hpc_c2g.data.load import load_split
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation import recovery
from hpc_c2g.evaluation.config import EvaluateConfig
from hpc_c2g.evaluation.landscape import picture, support
from hpc_c2g.evaluation.metric_registry import METRICS, numbers
from hpc_c2g.evaluation.metrics import (
    compare,
    measure_all,
    nearest_pairs,
    nearness,
    noise_samples,
    real_baseline,
    split_oracle,
)
from hpc_c2g.evaluation.oracle import Oracle
from hpc_c2g.files import write_atomically
from hpc_c2g.fitting.record import fitted_data
from hpc_c2g.generators.config import FreeImagesConfig
from hpc_c2g.generators.trained import TrainedGenerator
from hpc_c2g.monitoring.evaluation_log import log_evaluation
from hpc_c2g.monitoring.images import drawable, grid, save_png, zoom_for
from hpc_c2g.training.config.train import DistributedConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.results import Run, load_run
from hpc_c2g.training.step.bundles import class_counts
from hpc_c2g.training.step.sharding import batch_shares

PAIRS = 40
"""Number of training images in the side-by-side picture."""


def evaluate(config: EvaluateConfig, log_fn: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Evaluate the run and write ``evaluation.json``, ``nearest.png`` and a separate TensorBoard run into its folder.

    If a run has several classifiers, the samples of each are compared with the data of that classifier (``classifiers`` in
    ``evaluation.json``). Returns one result per classifier.

    Raises:
        UserError: There is no run, no data, or the data do not fit the classifier.
    """
    run_dir = Path(config.run_dir)
    run = load_run(run_dir)
    folders = run.config.classifiers
    several = len(folders) > 1
    if several and config.data is not None:
        raise UserError(
            f"data={config.data.name} is given for {len(folders)} classifiers",
            "leave it out: each is evaluated on the data that its record names",
        )
    results: list[dict[str, Any]] = []
    scalars: dict[str, float] = {}
    pictures: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    for k in range(len(folders)):
        suffix = f"-classifier{k}" if several else ""
        result, picture = _evaluate(config, run, k, suffix, log_fn)
        results.append(result)
        scalars |= {f"{name}{suffix}": value for name, value in _figures(result).items()}
        texts[f"beside its baselines{suffix}"] = _as_markdown(result)
        if picture is not None:
            save_png(picture, run_dir / f"nearest{suffix}.png", zoom_for(run.generator.input_shape[-1]))
            pictures[f"training images, below them the nearest samples{suffix}"] = picture
    content = {"uses_real_data": True, "classifiers": results} if several else results[0]
    write_atomically(run_dir / "evaluation.json", json.dumps(content, indent=2).encode())
    log_evaluation(run_dir, run.step, scalars, pictures, texts)
    return results


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Return one number by name for each metric that applies."""
    found = numbers(row)
    return {metric.name: found[metric.name] for metric in METRICS if metric.name in found}


def _as_markdown(result: Mapping[str, Any]) -> str:
    """Return a markdown table with the generator and its baselines, one row each."""
    names = list(_figures(result))
    rows = {"generator": result, **result["baselines"]}
    cells = [
        [who, *(f"{_figures(row)[n]:.3f}" if n in _figures(row) else "" for n in names)] for who, row in rows.items()
    ]
    return "\n".join(markdown.table(["samples", *names], cells))


def _evaluate(
    config: EvaluateConfig, run: Run, k: int, suffix: str, log_fn: Callable[[str], None]
) -> tuple[dict[str, Any], Tensor | None]:
    """Return (figures, a picture of training images beside their nearest samples) of one classifier."""
    folder, generator = run.config.classifiers[k], run.generator.only(k)
    data = fitted_data(folder, config.data)
    split = load_split(data)
    _check_fit(generator, split, data)
    oracle = split_oracle(split, config.seed)
    log_fn(f"evaluating the generator{f' as that of {folder}' if suffix else ''}")
    samples, labels = generator.sample(config.count, config.seed, config.drawing)
    comparison = compare(samples, labels, split, config.seed, oracle)
    write_atomically(Path(config.run_dir) / f"recovered{suffix}.csv", recovery.as_csv(comparison).encode())
    result: dict[str, Any] = {
        "uses_real_data": True,
        "classifier": folder,
        **measure_all(comparison),
        "recovery": recovery.report(comparison),
        "nearness": nearness(samples, split),
        "settings": {"count": config.count, "drawing": config.drawing, "seed": config.seed, "data": asdict(data)},
        "baselines": _baselines(config, run, k, suffix, split, oracle, log_fn) if config.baselines else {},
    }
    if generator.input_shape == (2,):
        result["support"] = _landscape(config, folder, split, samples, labels, suffix)
    return result, side_by_side(samples, split.train.samples) if drawable(generator.input_shape) else None


def _landscape(
    config: EvaluateConfig, folder: str, split: Split, samples: Tensor, labels: Tensor, suffix: str
) -> dict[str, Any]:
    """Draw the plane, and log the distances of generated points to the training points that carry multipliers."""
    bundle = load_bundle(folder)
    found = support(bundle, split.train, samples, labels)
    drawn = picture(bundle, split.train, samples, labels, found.carries)
    write_atomically(Path(config.run_dir) / f"landscape{suffix}.png", drawn)
    return {
        "samples": int(found.carries.sum()),
        "of": len(split.train),
        "distance_to_support": found.to_support,
        "distance_to_others": found.to_others,
    }


def _baselines(
    config: EvaluateConfig, run: Run, k: int, suffix: str, split: Split, oracle: Oracle, log_fn: Callable[[str], None]
) -> dict[str, Any]:
    """Return the metrics of real images, noise, a generator without stationarity and free images, for one classifier.

    Each baseline is a single solution.
    """
    settings = replace(run.config, distributed=DistributedConfig())  # in this one process
    first = k * settings.solutions  # index of the classifier's first member
    if len(settings.members) > 1:
        batch = batch_shares(settings, class_counts(run.generator.members))[first]
        own = settings.classifiers[k]
        limit = settings.micro_batch
        limit = min(limit, batch) if isinstance(limit, int) else limit
        settings = replace(settings, classifier=own, solutions=1, shares=[], global_batch=batch, micro_batch=limit)
    folder = Path(config.run_dir) / "baselines"

    def metrics_of(samples: Tensor, labels: Tensor) -> dict[str, Any]:
        comparison = compare(samples, labels, split, config.seed, oracle)
        return {**measure_all(comparison), "recovery": recovery.report(comparison)}

    log_fn("baseline: held-out real images and noise")
    shape, classes = tuple(split.train.samples.shape[1:]), len(split.train.classes)
    baselines = {
        "real": real_baseline(split, config.seed, oracle),
        "noise": metrics_of(*noise_samples(config.count, shape, split.train.value_range, classes, config.seed)),
    }
    log_fn("baseline: a generator trained on classification alone")
    without = replace(
        settings,
        run_dir=str(folder / f"classification_only{suffix}-{config.classification_steps}-at-{run.step}"),
        steps=min(config.classification_steps, settings.steps),
        stationarity=replace(settings.stationarity, weight=0.0),
        alpha=replace(
            settings.alpha, init=run.alphas[first], max_change=0.0
        ),  # without multipliers alpha cannot be learned
    )
    train(without)
    baselines["classification_only"] = metrics_of(
        *load_run(without.run_dir).generator.sample(config.count, config.seed, "plain")
    )
    log_fn("baseline: free images, the reconstruction peers' method")
    count = 2 * -(-len(split.train) // classes) * classes
    free = replace(
        settings,
        run_dir=str(folder / f"free_images{suffix}-{config.free_steps}"),
        steps=config.free_steps,
        global_batch=count,
        micro_batch=None,
        generator=FreeImagesConfig(),
        optimizer=replace(settings.optimizer, lr=0.01, lr_multipliers=0.01),
    )
    train(free)
    images = load_run(free.run_dir).generator
    baselines["free_images"] = metrics_of(*images.sample(count, config.seed, "plain"))
    drawn = {"multipliers": "free_images_by_multipliers", "supported": "free_images_supported"}.get(config.drawing)
    if drawn:
        baselines[drawn] = metrics_of(*images.sample(config.count, config.seed, config.drawing))
    return baselines


def _check_fit(generator: TrainedGenerator, split: Split, data: DataConfig) -> None:
    shape = tuple(split.train.samples.shape[1:])
    if shape != generator.input_shape:
        raise UserError(
            f"data={data.name} has samples of shape {list(shape)}, the generator makes {list(generator.input_shape)}",
            "name the data that the classifier was fitted to",
        )
    if len(split.train.classes) != len(generator.classes):
        raise UserError(
            f"data={data.name} has {len(split.train.classes)} classes, the generator {len(generator.classes)}",
            "name the data that the classifier was fitted to",
        )


def side_by_side(samples: Tensor, train: Tensor) -> Tensor:
    """Return a picture ``[channels, H, W]``: training images, each with its nearest sample below it, the best pairs first."""
    nearest = samples[nearest_pairs(samples, train)]
    order = (nearest - train).flatten(1).norm(dim=1).argsort()[:PAIRS]
    columns = min(20, len(order))
    rows = []
    for start in range(0, len(order), columns):
        chosen = order[start : start + columns]
        rows.append(grid(torch.cat([train[chosen], nearest[chosen]]), len(chosen)))
    width = rows[0].shape[2]
    return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[2]), value=0.5) for row in rows], 1)
