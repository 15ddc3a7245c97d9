"""Result of one check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        status: ``ok``, ``warning`` (a study can run), ``error`` (it cannot) or ``unknown`` (could not be checked).
        message: Finding, with the field and its value.
        hint: Fix; empty if there is nothing to fix.
    """

    status: str
    message: str
    hint: str = ""


def has_errors(results: Sequence[CheckResult]) -> bool:
    """Return True if any result is an error."""
    return any(result.status == "error" for result in results)
