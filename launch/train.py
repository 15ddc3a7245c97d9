"""``c2g train``: a generator from a classifier bundle, without data."""

from __future__ import annotations

import signal
import sys

from hpc_c2g.training.config import GENERATORS, TrainConfig
from hpc_c2g.training.loop import train as train_generator
from hpc_c2g.training.preemption import EXIT_PREEMPTED, Preempted
from launch.cli import run_verb


def train(config: TrainConfig) -> None:
    """Train or resume, and say where the results are."""
    try:
        result = train_generator(config)
    except Preempted as stop:
        print(f"c2g train: {stop}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT if stop.signal_name == "SIGINT" else EXIT_PREEMPTED)
    done = "trained" if result.steps_made else "complete already, nothing to do"
    print(f"run: {result.run_dir} ({done}); next: c2g evaluate run_dir={result.run_dir}")


def main() -> None:
    """Entry point."""
    run_verb("train", TrainConfig, train, {"generator": GENERATORS})


if __name__ == "__main__":
    main()
