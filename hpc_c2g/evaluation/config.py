"""Typed settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_c2g.data.config import DataConfig
from hpc_c2g.errors import UserError, require
from hpc_c2g.generators.config import check_drawing


@dataclass
class EvaluateConfig:
    """Settings of an evaluation.

    Attributes:
        run_dir: Run directory of the generator.
        data: Data set of the classifier; None takes the one that its record names.
        count: Number of samples to evaluate.
        drawing: Distribution of the samples: ``multipliers``, ``supported`` or ``plain`` (``TrainedGenerator.sample``).
        seed: Seed of the samples and of the split of held-out data.
        baselines: Also train and evaluate the baselines (kept in ``run_dir/baselines``).
        classification_steps: Steps of the baseline generator without stationarity, at most the run's own.
        free_steps: Steps of the free images.
    """

    run_dir: str = "???"
    data: DataConfig | None = None
    count: int = 1000
    drawing: str = "multipliers"
    seed: int = 0
    baselines: bool = True
    classification_steps: int = 1000
    free_steps: int = 3000

    def __post_init__(self) -> None:
        check_drawing(self.drawing)
        for name in ("count", "classification_steps", "free_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is too small", f"give {name} >= 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "give a seed from 0 to 2^63 - 1")
