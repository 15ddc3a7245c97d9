"""Cost of logging at its default frequency: within one run, logged steps against steps without logging."""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common import show, write_result
from hpc_c2g.data.config import DataConfig
from hpc_c2g.fitting.config import ClassifierConfig
from hpc_c2g.fitting.make import make_classifier
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.monitoring.run_log import due
from hpc_c2g.training.config.train import CheckpointConfig, TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.step.step_parts import StepResult
from hpc_c2g.training.step.train_step import TrainStep

SETTLED = 50
"""Steps that are left out: the first ones warm up."""


def step_seconds(config: TrainConfig) -> list[float]:
    """From the start of each step to the start of the next: computing, logging and drawing."""
    starts: list[float] = []
    original = TrainStep.__call__

    def timed(self: TrainStep, step: int, watch: bool = False, lr_scale: float = 1.0) -> StepResult:
        starts.append(time.perf_counter())
        return original(self, step, watch, lr_scale)

    TrainStep.__call__ = timed  # type: ignore[method-assign]
    try:
        train(config)
    finally:
        TrainStep.__call__ = original  # type: ignore[method-assign]
    return [b - a for a, b in itertools.pairwise(starts)]


def cost(seconds: list[float], config: TrainConfig) -> dict[str, float]:
    """Milliseconds of a plain step, of a line of metrics and of an image grid, and the share that both add to the run's time."""
    scalars, drawn, plain = [], [], []
    for step, took in enumerate(seconds, 1):
        if step <= SETTLED:
            continue
        if due(step, config.log.images_every, config.steps):
            drawn.append(took)
        elif due(step, config.log.every, config.steps):
            scalars.append(took)
        else:
            plain.append(took)
    base = statistics.median(plain)
    line, picture = (statistics.median(part) - base for part in (scalars, drawn))
    per_step = line / config.log.every + (picture - line) / config.log.images_every
    return {"step ms": 1e3 * base, "line ms": 1e3 * line, "images ms": 1e3 * picture, "cost": per_step / base}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short run")
    quick = parser.parse_args().quick
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        classifier = Path(folder) / "classifier"
        make_classifier(ClassifierConfig(out=str(classifier), data=DataConfig(train_size=100)))
        for batch in (200,) if quick else (200, 1000):
            config = TrainConfig(
                str(classifier),
                f"{folder}/run{batch}",
                steps=450 if quick else 1650 if batch == 200 else 850,
                global_batch=batch,
                log=LogConfig(progress=False),
                checkpoint=CheckpointConfig(every=10**6),  # a cost of its own
                device="cpu",
            )
            rows.append({"batch": batch, **cost(step_seconds(config), config)})
    show("logging, default frequency", rows)
    if not quick:
        settings = {"every": LogConfig.every, "images_every": LogConfig.images_every}
        print(f"written: {write_result('watching', settings, rows=rows)}")


if __name__ == "__main__":
    main()
