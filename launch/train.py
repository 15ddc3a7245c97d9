"""``c2g train``: a generator from a classifier bundle, without data."""

from __future__ import annotations

from pathlib import Path

from hpc_c2g.generators.config import GENERATORS
from hpc_c2g.logs import run_logging
from hpc_c2g.training.config.train import TrainConfig
from launch._compose.cli import run_verb


def train(config: TrainConfig) -> None:
    """Train or resume, and print the location of the results."""
    from hpc_c2g.distributed.environment import detect  # torch takes seconds to import: after the settings are checked
    from hpc_c2g.training.loop import train as train_generator

    rank = detect().rank
    with run_logging(config.log.level, rank, Path(config.run_dir) if config.log.all_ranks else None):
        result = train_generator(config)
    if rank:
        return
    done = "trained" if result.steps_made else "complete already, nothing to do"
    print(f"run: {result.run_dir} ({done}); next: c2g evaluate run_dir={result.run_dir}")


def main() -> None:
    """Run the verb."""
    run_verb("train", TrainConfig, train, {"generator": GENERATORS})


if __name__ == "__main__":
    main()
