"""Progress of a fit: one line for a terminal, and one per minute for a log file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hpc_c2g.fitting.config import MarginFitConfig

LOG_EVERY_SECONDS = 60.0
"""Seconds between lines of a log file."""


def line(fit: object, step: int, value: float) -> str:
    """Return the progress line of a fit with the settings ``fit``."""
    goal = (
        f"smoothed margin {value:.4g} of {fit.target_margin:g}"
        if isinstance(fit, MarginFitConfig)
        else f"loss {value:.4g}"
    )
    return f"fitting the classifier: step {step}, {goal}"


@dataclass
class LogLines:
    """Progress callback of a fit that writes at most one line per minute.

    Attributes:
        fit: Settings of the fit.
        write: Callable that writes a line.
        last_write: Monotonic time of the last line.
    """

    fit: object
    write: Callable[[str], None]
    last_write: float = field(default_factory=time.monotonic)

    def __call__(self, step: int, value: float) -> None:
        """Write the line if it is due."""
        if time.monotonic() - self.last_write >= LOG_EVERY_SECONDS:
            self.last_write = time.monotonic()
            self.write(line(self.fit, step, value))
