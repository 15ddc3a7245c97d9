"""The log of a run's steps: metrics.jsonl (the source of truth), TensorBoard, and a progress bar."""

from __future__ import annotations

import functools
import json
import logging
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically, writing
from hpc_c2g.monitoring import summaries
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.monitoring.event_file import BOARD, SESSION
from hpc_c2g.monitoring.images import bounded, grid
from hpc_c2g.monitoring.layout import layout
from hpc_c2g.monitoring.signatures import BY_NAME

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


logger = logging.getLogger(__name__)
HEADLINES = ("stationarity", "loss", "diversity", "unsupported")
"""Metrics that the HParams page shows beside the hyper-parameters."""


class MetricsFile:
    """metrics.jsonl, a line per logged step; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if line["step"] <= resumed_step]
        if path.exists():
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        with writing(path):
            self._file = open(path, "a")  # noqa: SIM115 -- held for the length of the run

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and flush it."""
        with writing(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a metrics file. A half-written last line is dropped; a damaged line before it is dropped with a warning."""
    lines = []
    texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            logger.warning("%s: line %d is damaged and left out", path, number)
    return lines


class RunLog:
    """Context that logs a run's steps; each channel decides whether it is due.

    Args:
        run_dir: Folder of metrics.jsonl and tensorboard/.
        config: Steps between two lines and between two grids of images.
        steps: Number of steps of the whole run.
        global_batch: Number of samples per step.
        resumed_step: Step of the checkpoint that the run resumes from; 0 without one.
    """

    def __init__(self, run_dir: Path, config: LogConfig, steps: int, global_batch: int, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only runs need it

        self.run_dir, self.config, self.steps, self.global_batch = run_dir, config, steps, global_batch
        self.metrics = MetricsFile(run_dir / "metrics.jsonl", resumed_step)
        self.resumed_step = resumed_step
        purge = resumed_step + 1  # also at 0: a start that left no checkpoint may have left events
        self.board = SummaryWriter(str(run_dir / BOARD), purge_step=purge)
        self.session = SummaryWriter(str(run_dir / SESSION), purge_step=0)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("residual {task.fields[residual]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not config.progress,
        )
        self._task = self.progress.add_task("train", total=steps, completed=resumed_step, residual="-")
        self._since, self._since_step = time.perf_counter(), resumed_step

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()
        try:
            with writing(self.run_dir):
                self.metrics.close()
                self.board.close()
                self.session.close()
        except UserError:
            if kind is None:  # else the first error is the one to report
                raise

    def log_run_summary(
        self,
        texts: Mapping[str, str],
        hyperparameters: Mapping[str, Any],
        prefixes: Sequence[str],
        losses: Sequence[str],
    ) -> None:
        """Write the description of a run before its first step: texts, hyper-parameters, the layout of its charts.

        Args:
            texts: Markdown texts by name.
            hyperparameters: Plain values by name.
            prefixes: Prefixes of the members' curves (see ``layout``).
            losses: Names of the weighted losses.
        """
        with writing(self.run_dir / BOARD):
            for name, text in texts.items():
                self.board.add_text(name, text, self.resumed_step)
            self.board.add_custom_scalars(layout(prefixes, losses))
            self.board.flush()
            # no experiment summary: TensorBoard would take its columns from one run, and hide settings that only others have
            for summary in summaries.session(hyperparameters):
                writer_of(self.session).add_summary(summary)
            self.session.flush()

    def step(self, step: int, scalars: Mapping[str, float], alarms: Sequence[str] = ()) -> None:
        """Show a step's progress, and log its scalars if they are due.

        Args:
            step: Number of the step, counted from 1.
            scalars: Values by name.
            alarms: Names of the failure signatures that begin to fire.
        """
        self.progress.update(self._task, completed=step, residual=f"{scalars['stationarity']:.4f}")
        if not due(step, self.config.every, self.steps):
            return
        now = time.perf_counter()
        rate = (step - self._since_step) * self.global_batch / max(now - self._since, 1e-9)
        self._since, self._since_step = now, step
        line = {**scalars, "samples_per_second": rate, "memory/peak_gib": _peak_memory()}
        self.metrics.write({"step": step, **line})
        with writing(self.run_dir / BOARD):
            add_scalars(self.board, line, step)
            if step == self.steps:
                add_scalars(self.session, {name: line[name] for name in HEADLINES if name in line}, step)
        for name in alarms:
            text = f"{BY_NAME[name].reason} -- {BY_NAME[name].advice}"
            logger.warning("%s: %s", name, text, extra={"step": step})
            with writing(self.run_dir / BOARD):
                self.board.add_text(f"alarm/{name}", text, step)

    def images(self, step: int, name: str, images: Tensor, columns: int) -> None:
        """Draw a grid of raw images ``[n, channels, h, w]`` in 0..1."""
        with writing(self.run_dir / BOARD):
            self.board.add_image(name, grid(*bounded(images, columns)), step)


def add_scalars(board: SummaryWriter, scalars: Mapping[str, float], step: int) -> None:
    """Write all scalars of a step as one event."""
    writer_of(board).add_summary(summaries.scalars(scalars), step)


def writer_of(board: SummaryWriter) -> Any:
    """Event file of a SummaryWriter, which accepts summaries of any kind."""
    return board._get_file_writer()  # type: ignore[no-untyped-call]


def due(step: int, every: int, steps: int) -> bool:
    """Return True every ``every`` steps, and at the first and the last step."""
    return step % every == 0 or step in (1, steps)


_on_gpu = functools.cache(torch.cuda.is_available)  # torch queries the driver at every call


def _peak_memory() -> float:
    """Peak memory of the process so far in GiB: GPU memory if there is a GPU, else resident memory."""
    if _on_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
