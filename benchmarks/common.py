"""Shared parts of the benchmarks: result files, tables, and a small classifier to train against."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hpc_c2g.classifiers.bundle import Bundle, build_model, save_bundle
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.files import write_atomically

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Facts that a measurement depends on: available cores and threads, GPU, versions."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "hpc_c2g": version("hpc_c2g"),
    }


def write_result(name: str, settings: Mapping[str, Any], **measured: Any) -> Path:
    """``benchmarks/results/<name>.json``, ``<name>_quick.json`` where ``quick`` is set: what was measured, how, on what machine.

    Raises:
        UserError: the file cannot be written.
    """
    file = RESULTS / f"{name}{'_quick' * bool(settings.get('quick'))}.json"
    content = {"benchmark": name, "machine": machine(), "settings": dict(settings), **measured}
    write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
    return file


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table; the first row's keys are its columns."""
    table = Table(title=title)
    for name in rows[0] if rows else []:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=150).print(table)


def random_classifier(
    folder: Path, size: int = 5, width: int = 24, classes: int = 4, seed: int = 0, depth: int = 2
) -> Path:
    """Save the bundle of an MLP with random weights: what is timed or compared needs no quality.

    Raises:
        UserError: the folder cannot be written.
    """
    shape = (1, size, size)
    architecture = {
        "target": "mlp",
        "input_shape": list(shape),
        "classes": classes,
        "width": width,
        "depth": depth,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(architecture).double()
    for parameter in model.parameters():
        parameter.data *= 3  # large enough that probes find a margin
    names = [str(label) for label in range(classes)]
    save_bundle(Bundle(model, architecture, names, shape, Normalization.constant(shape, 0.5)), folder)
    return folder
