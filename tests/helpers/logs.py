"""Log records of the package, for tests that need no pytest fixture (hypothesis, several per test)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def warnings_logged(pattern: str) -> Iterator[list[str]]:
    """Collect the warnings that ``hpc_c2g.*`` logs inside; at least one must match ``pattern``."""
    collector, logger = _Collector(), logging.getLogger("hpc_c2g")
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)
    assert any(re.search(pattern, message) for message in collector.messages), collector.messages
