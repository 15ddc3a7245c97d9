"""A training run under torchrun that a benchmark may watch and kill; it ends no process but the run's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path

from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config.train import CheckpointConfig

ROOT = Path(__file__).parents[1]
FINISH_WITHIN = 300.0
TIMED = re.compile(r"samples_per_second|memory/.*|wire/(seconds|hidden)|time/.*")
"""Names of metrics that differ between equal runs."""


class LaunchedRun:
    """Context of ``torchrun -m launch.train``; processes left at the end are killed by process id.

    Args:
        ranks: Number of processes.
        run_dir: Run directory; ``<name>.<n>.out`` beside it gets the output of the n-th start.
        overrides: Settings of the run.
    """

    def __init__(self, ranks: int, run_dir: Path, overrides: Sequence[str]) -> None:
        self.run_dir = run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        starts = len(list(run_dir.parent.glob(f"{run_dir.name}.*.out")))
        self._output = run_dir.with_name(f"{run_dir.name}.{starts + 1}.out")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with open(self._output, "w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "launch.train", f"run_dir={run_dir}", *overrides],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                cwd=run_dir.parent,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._seen: dict[int, int] = {}

    def __enter__(self) -> LaunchedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    @property
    def returncode(self) -> int | None:
        """Exit code of torchrun; None while it runs."""
        return self._process.poll()

    def alive(self) -> bool:
        """Return True while torchrun runs."""
        return self.returncode is None

    def ranks(self, count: int) -> dict[int, int]:
        """Wait for ``count`` ranks and return their process ids by rank; empty if torchrun ended before."""
        while self.alive():
            self._seen |= _ranks_of(self._process.pid)
            if len(self._seen) == count:
                return dict(self._seen)
            time.sleep(0.01)
        return {}

    def kill(self, pids: Collection[int]) -> bool:
        """Send SIGKILL to ranks that are still children of torchrun; return False if one is not."""
        if not pids or not set(pids) <= set(_ranks_of(self._process.pid).values()):
            return False
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return True

    def wait(self, seconds: float, pids: Collection[int]) -> bool:
        """Return True if torchrun and the processes ``pids`` end within ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.alive() and not any(_exists(pid) for pid in pids):
                return True
            time.sleep(0.02)
        return False

    def finish(self) -> bool:
        """Wait for the end of the run; return True if it ends without error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(FINISH_WITHIN)
        return self.returncode == 0

    def end(self) -> None:
        """Kill what still runs: torchrun first, so that it starts nothing."""
        mine = {**self._seen, **_ranks_of(self._process.pid)} if self.alive() else {}
        self._process.kill()
        for pid in mine.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def output(self) -> str:
        """Output of the run so far."""
        return self._output.read_text(errors="replace")

    def logged_step(self) -> int:
        """The last step in metrics.jsonl; 0 where there is none."""
        file = self.run_dir / "metrics.jsonl"
        steps = re.findall(r'^\{"step": (\d+),', file.read_text(), re.MULTILINE) if file.exists() else []
        return int(steps[-1]) if steps else 0

    def published_step(self) -> int:
        """The newest checkpoint's step; 0 where there is none."""
        return max(self._checkpoints().steps(), default=0)

    def is_publishing(self) -> bool:
        """Return True while a checkpoint is being written."""
        return any(self._checkpoints().folder.glob(".step_*.tmp"))

    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self.run_dir / "checkpoints", CheckpointConfig())

    def named_by(self, dead: Collection[int], world_size: int) -> tuple[str, ...]:
        """Reporters whose message names exactly the ranks ``dead``: ``run`` (its error), ``torchrun`` (its report)."""
        text = self.output()
        own = re.search(rf"rank ([\d, ]+) of {world_size} is gone", text)
        report = re.findall(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: (-?\d+)", text)
        reported = {
            "run": {int(rank) for rank in own[1].split(",")} if own else set(),
            "torchrun": {int(rank) for rank, code in report if int(code) == -signal.SIGKILL},
        }
        return tuple(reporter for reporter, ranks in reported.items() if ranks == set(dead))


def _ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process id of the children of ``launcher`` that torchrun gave a rank."""
    found = {}
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            with contextlib.suppress(OSError):
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(pid)
    return found


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def differences(run_dir: Path, other: Path) -> list[str]:
    """Names of what differs between the ends of two runs, to the last bit: the last checkpoint's state, every line of metrics."""
    mine, theirs = (_state(folder) for folder in (run_dir, other))
    differing = [name for name in sorted({*mine, *theirs}) if not _same(mine.get(name), theirs.get(name))]
    if _metrics(run_dir) != _metrics(other):
        differing.append("metrics.jsonl")
    return differing


def _state(run_dir: Path) -> dict[str, Any]:
    """Leaves of the newest checkpoint by name, its step among them."""
    newest = Checkpoints(run_dir / "checkpoints", CheckpointConfig()).latest()
    if newest is None:
        return {}
    leaves, _ = tree_flatten_with_path({"step": newest.step, **newest.state})
    return {"/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf for path, leaf in leaves}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not TIMED.fullmatch(k)} for line in lines]
