"""What a fit tells while it goes on: a line for a terminal, and once a minute one for a log file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hpc_c2g.fitting.config import MarginFitConfig

LOG_EVERY_SECONDS = 60.0
"""Between lines of a log file."""


def line(fit: object, step: int, value: float) -> str:
    """How far it is; ``fit`` are its settings."""
    goal = (
        f"smoothed margin {value:.4g} of {fit.target_margin:g}"
        if isinstance(fit, MarginFitConfig)
        else f"loss {value:.4g}"
    )
    return f"fitting the classifier: step {step}, {goal}"


@dataclass
class LogLines:
    """A fit's report that says a line once a minute.

    Attributes:
        fit: its settings.
        say: writes a line.
    """

    fit: object
    say: Callable[[str], None]
    told: float = field(default_factory=time.monotonic)

    def __call__(self, step: int, value: float) -> None:
        """Say it, if it is due."""
        if time.monotonic() - self.told >= LOG_EVERY_SECONDS:
            self.told = time.monotonic()
            self.say(line(self.fit, step, value))
