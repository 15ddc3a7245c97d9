"""What was looked at, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at.

    Attributes:
        status: ``ok``, ``warning`` (a study may run), ``error`` (it will not), ``unknown`` (nobody could tell).
        message: was found, with its value.
        mend: what can be done about it.
    """

    status: str
    message: str
    hint: str = ""


def wrong(found: Sequence[CheckResult]) -> bool:
    """Whether any is an error."""
    return any(f.status == "error" for f in found)
