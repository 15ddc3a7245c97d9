"""Run summary for TensorBoard, written before the first step: settings, versions, layout of the work, plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from hpc_c2g.distributed.environment import recorded
from hpc_c2g.monitoring.provenance import as_table, machine, revision, versions
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.run_directory import plain
from hpc_c2g.training.step.objective import kkt_backend_name
from hpc_c2g.training.trainer import TrainerSetup

PLAN = "plan.json"
"""Name of the file in the run's folder that ``c2g plan ... out=`` writes."""
PLACES = (
    "classifier", "run_dir", "log.progress", "log.level", "log.all_ranks", "profiler.steps", "profiler.ranks"
)  # fmt: skip
"""Settings that are no hyperparameters."""


def run_summary(setup: TrainerSetup) -> dict[str, str]:
    """Return markdown texts by name."""
    config = setup.config
    return {
        "1 settings": f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(plain(config)))}```",
        "2 versions": as_table({"revision": revision(), **versions(), "machine": machine()}),
        "3 layout": as_table(_layout(setup)),
        "4 plan": _plan(Path(config.run_dir) / PLAN),
        "5 environment": as_table(recorded(), ("variable", "value")),
    }


def start_message(setup: TrainerSetup) -> str:
    """Return the first log line: processes, device, generator, batch, and the bytes communicated per step."""
    config, world = setup.config, setup.world
    backend = torch.distributed.get_backend() if world.size > 1 else "no process group"
    numbers = sum(p.numel() for bundle in setup.bundles for p in bundle.parameters.values())
    size = getattr(torch, config.distributed.comm_dtype).itemsize
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    micro_batch = setup.micro_batch or "the whole share"
    return (
        f"starting: {config.steps} steps on {processes} ({world.launch.launcher}, {backend}), device {world.device},"
        f" dtype {config.dtype}, generator {config.generator.name}, global batch {config.global_batch},"
        f" micro-batch {micro_batch}, G {numbers * size} bytes"
    )


def _layout(setup: TrainerSetup) -> dict[str, object]:
    config, world, sharding = setup.config, setup.world, setup.sharding
    bundles = setup.bundles[:: config.solutions]
    return {
        "processes": world.size,
        "device": world.device,
        "launched by": world.launch.launcher,
        "groups of processes": setup.mesh.groups,
        "global batch": config.global_batch,
        "micro-batch": setup.micro_batch or "the whole share",
        "passes": "one" if sharding.one_pass else "two",
        "KKT sums": "; ".join(kkt_backend_name(bundle, config) for bundle in bundles),
        "ZeRO stage": config.zero_stage,
        "classifier parameters": ", ".join(
            str(sum(p.numel() for p in bundle.parameters.values())) for bundle in bundles
        ),
        "advice": "; ".join(setup.advice()) or "none",
        "classifiers": ", ".join(bundle.fingerprint for bundle in bundles),
    }


def _plan(file: Path) -> str:
    try:
        plan = json.loads(file.read_text())
        step, memory = plan["step"], plan["memory"]
        rows = {"seconds per step": f"{step['total']:.4g}", "GiB per rank": f"{memory['total'] / 2**30:.3f}"}
    except FileNotFoundError:
        return f"none: `c2g plan ... out=RUN_DIR/{PLAN}` before the run begins writes one"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{PLAN} cannot be read: {error!r}"
    return as_table({**rows, "hardware": plan.get("hardware", {}).get("name", "")})


def hyperparameters(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as flat names with plain values, without paths."""
    return {name: value for name, value in _flat(plain(config)) if name not in PLACES}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}.")
        else:
            found.append((name, value if isinstance(value, (bool, int, float, str)) else str(value)))
    return found
