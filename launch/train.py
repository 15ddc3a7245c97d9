"""``c2g train``: a generator from a classifier bundle, without data."""

from __future__ import annotations

from hpc_c2g.generators.config import GENERATORS
from hpc_c2g.training.config.train import TrainConfig
from launch._compose.cli import run_verb


def train(config: TrainConfig) -> None:
    """Train or resume, and say where the results are."""
    from hpc_c2g.distributed.environment import detect  # torch takes seconds to import: after the settings are checked
    from hpc_c2g.training.loop import train as train_generator

    result = train_generator(config)
    if detect().rank:
        return  # rank 0 speaks for all
    done = "trained" if result.steps_made else "complete already, nothing to do"
    print(f"run: {result.run_dir} ({done}); next: c2g evaluate run_dir={result.run_dir}")


def main() -> None:
    """Entry point."""
    run_verb("train", TrainConfig, train, {"generator": GENERATORS})


if __name__ == "__main__":
    main()
