"""``python -m benchmarks.wire [--quick]``: every byte that training hands to a collective, counted where it is handed over.

Per step and classifier the residual all-reduce must take 4 P bytes (2 P in bfloat16), and the generator's gradient 4 P_gen: the ring's
factor aside. It also measures how much of the residual's communication overlaps with computation.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import random_classifier, show, write_result
from hpc_c2g.classifiers.bundle import load_bundle
from hpc_c2g.distributed.local import on_local_ranks
from hpc_c2g.distributed.world import World
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import CheckpointConfig, DistributedConfig, TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.results import load_run
from hpc_c2g.training.step.step_parts import StepResult
from hpc_c2g.training.step.train_step import TrainStep

COLLECTIVES = (
    "all_reduce",
    "all_to_all_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "reduce",
)
SMALL = 8192
"""Bytes: below are scalars, flags and names; above, in this benchmark, residual and gradients."""
STEPS, FIRST = 22, 3


def counted(world: World, configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """Per run, the bytes that one rank passed to collectives per step, and the bytes in its log."""
    torch.set_num_threads(1)
    return [_count(world, config) for config in configs]


def _count(world: World, config: TrainConfig) -> dict[str, Any]:
    handed: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    scalars: list[dict[str, float]] = []
    step = TrainStep.__call__

    def watched(self: TrainStep, number: int, watch: bool = False, lr_scale: float = 1.0) -> StepResult:
        if number == FIRST:  # what is sent once, and with the first line of the log, is not a step's
            handed.clear()
        if number == config.steps:  # as little as what is sent with the last one
            counted.update(handed)
        result = step(self, number, watch, lr_scale)
        scalars.append(result.scalars)
        return result

    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str, original: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            size = max((t.numel() * t.element_size() for t in tensors), default=0)
            handed["small" if size <= SMALL else name] += size
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(dist, name, counting(name, original))
    TrainStep.__call__ = watched  # type: ignore[method-assign, assignment]
    try:
        train(config, world)
    finally:
        TrainStep.__call__ = step  # type: ignore[method-assign]
        for name, original in originals.items():
            setattr(dist, name, original)
    later = scalars[FIRST - 1 : -1]
    mean = {key: sum(line[key] for line in later) / len(later) for key in ("wire/bytes", "wire/seconds", "wire/hidden")}
    return {"handed": {name: size / len(later) for name, size in counted.items()}, **mean}


def main() -> None:
    """Print the table, write ``results/wire.json``, and fail where a byte is not accounted for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two processes and a small net")
    quick = parser.parse_args().quick
    size, width, batch = (8, 200, 64) if quick else (28, 1000, 1024)
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = [random_classifier(folder / f"c{k}", size, width, 10, k, depth=3) for k in range(2)]
        P = sum(p.numel() for p in load_bundle(bundles[0]).parameters.values())
        for ranks in (2,) if quick else (2, 4):
            cases: dict[str, dict[str, Any]] = {
                "one pass": {},
                "two passes of 1/8": {"micro_batch": batch // 8},
                "bfloat16 wire": {"distributed": DistributedConfig(comm_dtype="bfloat16")},
                "2 classifiers, a group each": {"classifier": [str(b) for b in bundles]},
                "2 classifiers on every rank": {
                    "classifier": [str(b) for b in bundles],
                    "distributed": DistributedConfig(groups=1),
                },
            }
            configs = [
                TrainConfig(
                    **{
                        "classifier": str(bundles[0]),
                        "run_dir": str(folder / f"{ranks}-{number}"),
                        "steps": STEPS,
                        "global_batch": batch,
                        "device": "cpu",
                        "alpha": AlphaConfig(init=0.0),
                        "log": LogConfig(every=10**6, images_every=10**6, progress=False),
                        "checkpoint": CheckpointConfig(every=10**6),
                        **changes,
                    }
                )
                for number, changes in enumerate(cases.values())
            ]
            measured = on_local_ranks(ranks, counted, configs, seconds=900)[0]
            for case, config, found in zip(cases, configs, measured, strict=True):
                module = load_run(config.run_dir).generator.module
                gradients = 4 * sum(p.numel() for p in module.parameters())
                groups = len(config.classifiers) if "group each" in case else 1
                alone = ranks == groups
                each = 0 if alone else (2 if "bfloat16" in case else 4) * P
                expected = each * (len(config.classifiers) // groups)
                sent = sum(value for key, value in found["handed"].items() if key != "small")
                # bfloat16 is handed over twice: to the owners of the shares, and back
                expected_sent = expected * (2 if "bfloat16" in case else 1) + gradients
                logged = found["wire/bytes"]
                if (
                    abs(logged - expected) > 0.001 * max(expected, 1)
                    or abs(sent - expected_sent) > 0.001 * expected_sent
                ):
                    wrong.append(
                        f"{case} on {ranks}: logged {logged}, sent {sent}, expected {expected}, {expected_sent}"
                    )
                rows.append(
                    {
                        "case": case,
                        "ranks": ranks,
                        "residual bytes": logged,
                        "/ P": logged / P,
                        "+ gradient": gradients,
                        "handed over": sent,
                        "small": found["handed"].get("small", 0),
                        "residual ms": 1e3 * found["wire/seconds"],
                        "hidden": found["wire/hidden"],
                    }
                )
    show(f"P = {P}, batch {batch}: bytes per step and rank", rows)
    settings = {"quick": quick, "P": P, "batch": batch, "steps": STEPS}
    print(f"written: {write_result('wire', settings, rows=rows)}")
    if wrong:
        sys.exit("bytes that nobody accounts for: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
