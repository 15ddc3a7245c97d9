"""What was looked at, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``ok``, ``warning`` (a study may run), ``error`` (it will not), ``unknown`` (nobody could tell).
        what: was found, with its value.
        mend: what can be done about it.
    """

    level: str
    what: str
    mend: str = ""


def wrong(found: Sequence[Finding]) -> bool:
    """Whether any is an error."""
    return any(f.level == "error" for f in found)
