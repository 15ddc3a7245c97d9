"""Time of each phase of a step: wall time on a CPU, CUDA events on a GPU, which are synchronized only when they are read."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.profiler import record_function

from hpc_c2g.distributed.world import World

PHASES = ("kkt_sum", "all_reduce", "cotangents", "optimizer", "log", "checkpoint")
"""First pass; waiting for G and for the scalars; second pass with the generator's backward and its all-reduce; update; writing."""
OWN = ("kkt_sum", "cotangents", "optimizer")
"""Phases that count as work: in a collective a fast rank only waits for a slow one."""


class Phases:
    """Timer that adds time to the phase that was entered last, and marks it as a range in the trace of ``torch.profiler``.

    Args:
        device: Device whose time is measured.

    Attributes:
        seconds: Seconds of each phase since the last ``take``, as far as they are known.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._open: tuple[str, Any, record_function] | None = None
        self._events: list[tuple[str, Any, Any]] = []

    def enter(self, phase: str) -> None:
        """End the current phase and begin ``phase``."""
        now = self._end()
        trace_range = record_function(phase)
        trace_range.__enter__()  # type: ignore[no-untyped-call]
        self._open = phase, now, trace_range

    def stop(self) -> None:
        """End the current phase; until the next one is entered, no time is counted."""
        self._end()

    def take(self) -> dict[str, float]:
        """Return seconds by phase since the last call, without the current phase."""
        if self._events:
            self._events[-1][2].synchronize()
        for phase, began, ended in self._events:
            self.seconds[phase] += began.elapsed_time(ended) / 1e3
        self._events = []
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def _end(self) -> Any:
        """Add the time of the current phase; returns the present time."""
        now = self._now()
        if self._open is not None:
            phase, began, trace_range = self._open
            self._open = None
            trace_range.__exit__(None, None, None)
            if self.on_gpu:
                self._events.append((phase, began, now))
            else:
                self.seconds[phase] += now - began
        return now

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def shares(seconds: dict[str, float], world: World) -> dict[str, float]:
    """Return the share of each phase in the time of all ranks and, with several ranks, the rank that works longest; collective."""
    own = torch.tensor([[seconds[phase] for phase in PHASES]], dtype=torch.float64, device=world.device)
    table = world.gather(own).cpu()
    total = max(float(table.sum()), 1e-9)
    scalars = {f"time/{phase}": float(part) / total for phase, part in zip(PHASES, table.sum(0), strict=True)}
    if world.size > 1:
        work = table[:, [PHASES.index(phase) for phase in OWN]].sum(1)
        scalars["time/slowest_rank"] = float(work.argmax())
        scalars["time/slowest_over_mean"] = float(work.max() / work.mean().clamp_min(1e-9))
    return scalars
