"""Make a classifier bundle from a data set or from a user's weights."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_c2g.classifiers.bundle import (
    CERTIFICATE,
    META,
    Bundle,
    build_model,
    load_bundle,
    load_state_dict_file,
    load_weights,
    save_bundle,
)
from hpc_c2g.classifiers.models import ARCHITECTURES
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.data.dataset import Dataset, Split
from hpc_c2g.data.load import load_split
from hpc_c2g.denormals import flush_denormals
from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically
from hpc_c2g.fitting.config import (
    ClassifierConfig,
    ImportFitConfig,
    MarginFitConfig,
    NormalizationConfig,
    OrdinaryFitConfig,
)
from hpc_c2g.fitting.fit import fit_margin, fit_ordinary, initialize
from hpc_c2g.kkt.margins import pairwise_margins, smallest_margins

RECORD = "fit.json"
"""File of the fit's measurements beside the bundle: for people and for evaluation, never read by generator training."""


def make_classifier(
    config: ClassifierConfig, report: Callable[[int, float], None] | None = None
) -> tuple[Bundle, dict[str, Any]]:
    """Make the bundle in ``config.out``, or load it if it was made with the same settings.

    Returns:
        The bundle and its record (accuracies, margin, steps, seconds).

    Raises:
        UserError: another classifier is in ``out``, or any fault of data, architecture, weights or fit.
    """
    folder = Path(config.out)
    settings = asdict(config)
    del settings["out"], settings["overwrite"]
    settings = json.loads(json.dumps(settings))
    # the file may change under the same name
    if isinstance(config.fit, ImportFitConfig) and Path(config.fit.state_dict).is_file():
        settings["fit"]["sha256"] = hashlib.sha256(Path(config.fit.state_dict).read_bytes()).hexdigest()
    if (folder / META).exists() and not config.overwrite:
        record = read_record(folder)
        if record.get("settings") == settings:
            return load_bundle(folder), record
        raise UserError(f"out={folder} holds another classifier", "choose another out, or overwrite=true to replace it")
    bundle, record = _imported(config) if isinstance(config.fit, ImportFitConfig) else _fitted(config, report)
    save_bundle(bundle, folder)
    (folder / CERTIFICATE).unlink(missing_ok=True)  # it belongs to the previous classifier
    record = {"settings": settings, "weights_sha256": bundle.fingerprint, **record}
    write_atomically(folder / RECORD, json.dumps(record, indent=2).encode())
    return bundle, record


def read_record(folder: Path) -> dict[str, Any]:
    """Read the fit record beside a bundle; empty if there is none for these weights."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        same = record["weights_sha256"] == json.loads((folder / META).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return record if same else {}  # a record of other weights belongs to a previous classifier


@flush_denormals()
def _fitted(config: ClassifierConfig, report: Callable[[int, float], None] | None) -> tuple[Bundle, dict[str, Any]]:
    split = load_split(config.data)
    shape = tuple(split.train.samples.shape[1:])
    normalization = _normalization(config.normalization, shape, split.train)
    architecture = _architecture(config.model, shape, len(split.train.classes))
    model = build_model(architecture)
    initialize(model, config.init, config.seed)
    x = normalization.normalize(split.train.samples.double())
    began = time.perf_counter()
    if isinstance(config.fit, MarginFitConfig):
        steps = fit_margin(model, x, split.train.labels, config.fit, report)
    elif isinstance(config.fit, OrdinaryFitConfig):
        steps = fit_ordinary(model, x, split.train.labels, config.fit, config.seed, report)
    else:
        raise UserError(f"fit.name={config.fit.name!r} is unknown", "choose fit=margin, fit=ordinary or fit=import")
    seconds = time.perf_counter() - began
    bundle = Bundle(model, architecture, split.train.classes, shape, normalization)
    return bundle, {"steps": steps, "seconds": round(seconds, 2), **describe(bundle, split)}


def _imported(config: ClassifierConfig) -> tuple[Bundle, dict[str, Any]]:
    assert isinstance(config.fit, ImportFitConfig)
    if config.input_shape is None or config.classes is None:
        raise UserError(
            f"fit=import needs input_shape (now {config.input_shape}) and classes (now {config.classes})",
            "give for example input_shape=[1,28,28] classes=10",
        )
    names = (
        [str(i) for i in range(config.classes)] if isinstance(config.classes, int) else [str(c) for c in config.classes]
    )
    if config.normalization.kind != "constant":
        raise UserError(
            f"fit=import cannot use normalization.kind={config.normalization.kind}",
            "give normalization.kind=constant with the mean and scale that the classifier was trained with",
        )
    shape = tuple(config.input_shape)
    architecture = _architecture(config.model, shape, len(names))
    model = build_model(architecture)
    load_weights(model, load_state_dict_file(Path(config.fit.state_dict)), f"fit.state_dict={config.fit.state_dict}")
    return Bundle(model, architecture, names, shape, _normalization(config.normalization, shape, None)), {}


def _architecture(model: dict[str, Any], shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    target = model.get("_target_")
    own = {k: v for k, v in model.items() if k != "_target_"}
    implied = {"input_shape": list(shape), "classes": classes} if target in ARCHITECTURES else {}
    return {"target": target, **implied, **own}


def _normalization(config: NormalizationConfig, shape: tuple[int, ...], train: Dataset | None) -> Normalization:
    low, high = config.value_range or (train.value_range if train is not None else (0.0, 1.0))
    mean: Any = config.mean
    scale: Any = config.scale
    if config.kind != "constant" and train is not None:
        mean = train.samples.double().mean(0)
    if config.kind == "standard" and train is not None:
        deviation = train.samples.double().std(0, correction=0)
        scale = torch.where(deviation > 0, deviation, 1.0)
    return Normalization.constant(shape, mean, scale, (low, high))


@torch.no_grad()
def describe(bundle: Bundle, split: Split) -> dict[str, float]:
    """Measure the accuracies on both parts and the smallest training margin."""

    def logits(part: Dataset) -> Tensor:
        x = bundle.normalization.normalize(part.samples.to(bundle.dtype))
        out: Tensor = torch.cat([bundle.model(micro_batch) for micro_batch in torch.split(x, 1000)])
        return out

    train, held_out = logits(split.train), logits(split.held_out)
    margins = smallest_margins(pairwise_margins(train, split.train.labels), split.train.labels)
    return {
        "train_accuracy": float((train.argmax(1) == split.train.labels).double().mean()),
        "held_out_accuracy": float((held_out.argmax(1) == split.held_out.labels).double().mean()),
        "smallest_margin": float(margins.min()),
    }
