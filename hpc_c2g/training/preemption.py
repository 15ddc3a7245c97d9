"""Signals as a flag that the training loop checks between steps: save, then exit with a dedicated code."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

EXIT_PREEMPTED = 75
"""Exit code EX_TEMPFAIL: saved, run the same command to resume."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Preempted(Exception):  # noqa: N818 -- no error: the run is saved
    """Raised by the loop after a checkpoint was published because a signal requested to stop."""

    def __init__(self, signal_name: str, step: int) -> None:
        self.signal_name, self.step = signal_name, step
        done = f"saved after step {step}" if step else "stopped before the first step, there was nothing to save"
        super().__init__(f"{signal_name}: {done}; run the same command to resume")


class PreemptionFlag:
    """Context in which SIGINT, SIGTERM and SIGUSR2 only set ``signal_name``; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __enter__(self) -> PreemptionFlag:
        self._before = {number: signal.signal(number, self._set) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
