"""Handlers for the loggers ``hpc_c2g.*``: rank 0 on stderr, every rank in a file of its own on request.

Modules log with ``logging.getLogger(__name__)`` and pass the training step as ``extra={"step": step}``. Importing the package installs
no handler: a program that calls ``train()`` configures logging as it likes. The verbs and the stages of a study use ``run_logging``.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from hpc_c2g.files import writing

LEVELS = ("debug", "info", "warning", "error")
LOGGER = "hpc_c2g"
LOGS = "logs"
"""Folder of the ranks' log files, in the run directory."""
FORMAT = "%(asctime)s %(levelname)s [%(place)s] %(name)s: %(message)s"


class PlaceFilter(logging.Filter):
    """Adds ``place`` to each record: the rank, the host and, where the record has one, the training step.

    Args:
        rank: Rank of this process.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.place = f"rank {rank} {socket.gethostname()}"

    def filter(self, record: logging.LogRecord) -> bool:
        """Set ``record.place`` and keep the record."""
        step = getattr(record, "step", None)
        record.place = self.place if step is None else f"{self.place} step {step}"
        return True


class ConsoleHandler(logging.Handler):
    """Writes to the ``sys.stderr`` of the moment: while a progress bar is shown, that is rich's, which prints above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record and flush it."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def run_logging(level: str, rank: int, run_dir: Path | None = None) -> Iterator[None]:
    """Handle the records of ``hpc_c2g.*`` inside the context; the logger is left as it was found.

    Records do not propagate to the root logger meanwhile, so that a handler installed there does not print them a second time.

    Args:
        level: Lowest level that is logged, one of ``LEVELS``.
        rank: Rank of this process. Only rank 0 logs to the console.
        run_dir: Run directory; this rank also logs to ``logs/rank_RRRRR.log`` in it. None for the console alone.

    Raises:
        UserError: The log file cannot be written.
    """
    logger = logging.getLogger(LOGGER)
    # without any handler, Python would print warnings of the other ranks too
    handlers: list[logging.Handler] = [ConsoleHandler() if rank == 0 else logging.NullHandler()]
    if run_dir is not None:
        file = run_dir / LOGS / f"rank_{rank:05d}.log"
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(file, encoding="utf-8"))
    formatter, place = logging.Formatter(FORMAT), PlaceFilter(rank)
    before = logger.level, logger.propagate
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.addFilter(place)
        logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]
