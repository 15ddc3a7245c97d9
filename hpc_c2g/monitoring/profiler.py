"""Traces of chosen training steps by ``torch.profiler``, for Perfetto and TensorBoard (docs/profiling.md)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hpc_c2g.errors import UserError, require

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
PROFILER = "profiler"
"""Folder of traces and memory snapshots, in the run directory."""
MAX_ALLOCATIONS = 100_000
"""Largest number of allocations and frees that a snapshot of CUDA memory holds."""


@dataclass
class ProfilerConfig:
    """Trace of some training steps.

    Attributes:
        steps: First and last step of the trace, ``[2,4]`` for the steps 2, 3 and 4; empty for no trace.
        ranks: Ranks that write a trace, each a file of its own.
    """

    steps: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        ordered = not self.steps or (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1])
        require(
            ordered, "profiler.steps", self.steps, "give the first and the last step, such as [10,12], or [] for none"
        )
        ranks = bool(self.ranks) and all(rank >= 0 for rank in self.ranks)
        require(ranks, "profiler.ranks", self.ranks, "give one rank >= 0 or more, such as [0]")


class StepProfiler:
    """Context that starts and stops the trace. It never changes a result, and a trace that cannot be written ends no run.

    Args:
        config: Steps and ranks to trace.
        run_dir: Run directory; the trace is written to ``profiler/`` in it.
        rank: Rank of this process.
        world_size: Number of processes.
        device: Device of this process.

    Raises:
        UserError: ``config`` names a rank that the job does not have; on every rank.
    """

    def __init__(self, config: ProfilerConfig, run_dir: Path, rank: int, world_size: int, device: torch.device) -> None:
        if config.steps and max(config.ranks) >= world_size:
            raise UserError(
                f"profiler.ranks={config.ranks} names a rank that this job of {world_size} processes does not have",
                f"give ranks from 0 to {world_size - 1}",
            )
        self.config, self.folder, self.on_gpu = config, run_dir / PROFILER, device.type == "cuda"
        self.steps = range(config.steps[0], config.steps[1] + 1) if config.steps and rank in config.ranks else range(0)
        self.stem = f"rank_{rank:05d}_steps_{'-'.join(map(str, config.steps))}"
        self._trace: torch.profiler.profile | None = None
        self._first = True

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()  # the trace of a run that ends within the range holds the steps so far

    def before_step(self, step: int) -> None:
        """Start the trace before its first step, stop and write it after its last one.

        Args:
            step: Number of the next step, counted from 1.
        """
        first, self._first = self._first, False
        if first and self.steps and step >= self.steps.stop:
            logger.warning("profiler: nothing is traced: the run resumes after profiler.steps=%s", self.config.steps)
        if step not in self.steps:
            self._stop()
        elif self._trace is None:
            self._start()

    def _start(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self._trace = profile(activities=activities, profile_memory=True)
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
        self._trace.start()

    def _stop(self) -> None:
        import torch

        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        file = self.folder / f"{self.stem}.pt.trace.json.gz"  # the name that TensorBoard's plugin reads
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(file))
            logger.info("profiler: trace written: %s", file)
            if self.on_gpu:
                snapshot = self.folder / f"{self.stem}.memory.pickle"
                torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]
                logger.info("profiler: memory snapshot written: %s", snapshot)
        except OSError as error:
            logger.warning("profiler: %s cannot be written: %s", file, error.strerror)
        finally:
            if self.on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
