"""Typed settings of the metrics log and of the alarms."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_c2g.errors import require
from hpc_c2g.logs import LEVELS

POLICIES = ("continue", "stop", "lower_lr")


@dataclass
class LogConfig:
    """The log of a run.

    Attributes:
        every: Steps between two lines of metrics.
        images_every: Steps between two grids of images.
        progress: Show a progress bar on stderr.
        level: Lowest level of log messages: ``debug``, ``info``, ``warning`` or ``error``. Rank 0 prints them to stderr.
        all_ranks: Each rank also logs to ``run_dir/logs/rank_RRRRR.log``.
    """

    every: int = 20
    images_every: int = 200
    progress: bool = True
    level: str = "info"
    all_ranks: bool = False

    def __post_init__(self) -> None:
        require(self.every >= 1, "log.every", self.every, "give a number of steps >= 1")
        require(self.images_every >= 1, "log.images_every", self.images_every, "give a number of steps >= 1")
        require(self.level in LEVELS, "log.level", self.level, f"choose {', '.join(LEVELS)}")


@dataclass
class AlarmConfig:
    """Reaction to a signature of failure that fires (hpc_c2g/monitoring/signatures.py).

    Attributes:
        policy: ``continue`` and log it; ``stop`` after a checkpoint; ``lower_lr`` halves all learning rates each time that a signature
            begins to fire.
    """

    policy: str = "continue"

    def __post_init__(self) -> None:
        require(self.policy in POLICIES, "alarms.policy", self.policy, f"choose {', '.join(POLICIES)}")
