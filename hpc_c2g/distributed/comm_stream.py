"""Collectives that overlap with computation: on a CUDA stream, or on a thread on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class CommStream:
    """Queue that runs communication in order while the caller computes.

    Every rank must submit the same collectives in the same order.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self._pool = None if self.on_gpu else ThreadPoolExecutor(1, thread_name_prefix="comm")
        self._pending: list[Future[float]] = []
        self._events: list[tuple[Any, Any]] = []
        self._busy = self._exposed = 0.0
        self._waits: list[tuple[Any, Any]] = []

    def submit(self, work: Callable[[], None]) -> None:
        """Queue ``work``; on a GPU it starts after the kernels launched so far."""
        if self._pool is not None:
            self._pending.append(self._pool.submit(_timed, work))
            return
        begin, end = _event(), _event()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            begin.record()
            work()
            end.record()
        self._events.append((begin, end))

    def wait(self) -> None:
        """Wait for all queued work (on a GPU: make the current stream wait); re-raises the work's exception."""
        if self._pool is not None:
            began = time.perf_counter()
            pending, self._pending = self._pending, []
            for future in pending:
                self._busy += future.result()
            self._exposed += time.perf_counter() - began
            return
        reached = _event()
        reached.record()
        torch.cuda.current_stream().wait_stream(self.stream)
        if self._events:
            self._waits.append((reached, self._events[-1][1]))

    def seconds(self) -> tuple[float, float]:
        """Seconds of communication since the last call, and the exposed part that computation waited for."""
        if self.on_gpu:
            torch.cuda.synchronize()
            self._busy = sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._exposed = sum(max(0.0, reached.elapsed_time(end)) for reached, end in self._waits) / 1e3
            self._events, self._waits = [], []
        busy, exposed = self._busy, min(self._exposed, self._busy)
        self._busy = self._exposed = 0.0
        return busy, exposed


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
