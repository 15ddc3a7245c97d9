"""Where a step's time goes: wall time between marks, on a GPU by events on its stream, which wait for nothing until they are asked."""

from __future__ import annotations

import time
from typing import Any

import torch

from hpc_c2g.distributed.world import World

PHASES = ("kkt_sum", "all_reduce", "cotangents", "optimizer", "log", "checkpoint")
"""Pass 1; what is waited for G and the scalars; pass 2 with the generator's backward and its sum; the update; writing."""
OWN = ("kkt_sum", "cotangents", "optimizer")
"""Phases in which a rank works by itself: in a collective a fast rank only waits for a slow one."""


class Phases:
    """Charges the time since the last mark to a phase."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, Any]] = []
        self._last = self._now()

    def start(self) -> None:
        """Begin here: what was before is nobody's."""
        self._settle()
        self._last = self._now()

    def mark(self, phase: str) -> None:
        """The time since the last mark was spent on ``phase``."""
        now = self._now()
        if self.on_gpu:
            self._events.append((phase, now))
            return
        self.seconds[phase] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        self._settle()
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _settle(self) -> None:
        if self._events:
            self._events[-1][1].synchronize()
        for phase, event in self._events:
            self.seconds[phase] += self._last.elapsed_time(event) / 1e3
            self._last = event
        self._events = []


def shares(seconds: dict[str, float], world: World) -> dict[str, float]:
    """Each phase's share of the time, the mean over ranks, and with several ranks the one that works longest; collective."""
    own = torch.tensor([[seconds[phase] for phase in PHASES]], dtype=torch.float64, device=world.device)
    table = world.gather(own).cpu()
    total = max(float(table.sum()), 1e-9)
    told = {f"time/{phase}": float(part) / total for phase, part in zip(PHASES, table.sum(0), strict=True)}
    if world.size > 1:
        work = table[:, [PHASES.index(phase) for phase in OWN]].sum(1)
        told["time/slowest_rank"] = float(work.argmax())
        told["time/slowest_over_mean"] = float(work.max() / work.mean().clamp_min(1e-9))
    return told
