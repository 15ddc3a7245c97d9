"""Reader of a run: its configuration and its generator, from the newest whole checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hpc_c2g.errors import UserError
from hpc_c2g.generators.networks import build_generator
from hpc_c2g.generators.trained import TrainedGenerator, members_from
from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config.train import TrainConfig, config_from
from hpc_c2g.training.engines.engine_state import check_fit
from hpc_c2g.training.run_directory import read_config
from hpc_c2g.training.step.bundles import boxes, class_counts
from hpc_c2g.training.step.sharding import batch_shares


@dataclass(frozen=True)
class Run:
    """Latest state of a run: its settings, its generator, each classifier's alpha, the step of its newest checkpoint."""

    config: TrainConfig
    generator: TrainedGenerator
    alphas: list[float]
    step: int


def load_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run, without its classifier and without data.

    Raises:
        UserError: There is no run, no checkpoint yet, or all are damaged.
    """
    folder = Path(run_dir)
    config = config_from(read_config(folder / "config.yaml"))
    checkpoint = Checkpoints(folder / "checkpoints", config.checkpoint).latest()
    if checkpoint is None:
        raise UserError(f"run_dir={folder} has no checkpoint yet", "let `c2g train` run until its first checkpoint")
    kept = checkpoint.state["trained"]
    members = members_from(kept)
    classes, (lower, upper) = class_counts(members), boxes(members)
    counts = batch_shares(config, classes)
    module = build_generator(config.generator, kept["dimensions"], classes, counts, lower, upper, config.seed)
    check_fit(checkpoint.state["engine"], {name: tensor.shape for name, tensor in module.state_dict().items()})
    module.load_state_dict(checkpoint.state["engine"]["weights"])
    module.eval().requires_grad_(False)
    generator = TrainedGenerator(module.float(), kept["dimensions"], members)
    return Run(config, generator, checkpoint.state["scale"]["alpha"], checkpoint.step)
