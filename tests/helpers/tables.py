"""Tables of cases in one test: every row is checked, and the failure names all rows that break the law."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def offenders(rows: Iterable[Sequence[Any]], check: Callable[..., None]) -> list[str]:
    """Call ``check`` with each row; returns the rows that fail, with the reason. A table without rows fails too."""
    rows = list(rows)
    found = [] if rows else ["the table has no rows"]
    for row in rows:
        try:
            check(*row)
        except Exception as error:
            found.append(f"{row!r}: {type(error).__name__}: {error}")
    return found
