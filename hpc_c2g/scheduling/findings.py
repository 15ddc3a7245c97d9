"""What was looked at and found, and how programs are asked."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PATIENCE = 20.0
"""Seconds after which a command counts as not answered."""
Record = Mapping[str, str]


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


class Answer(NamedTuple):
    """What a program said; ``code`` is None where it is missing or did not end in time."""

    code: int | None
    output: str
    fault: str


def ask(*command: str, seconds: float = PATIENCE) -> Answer:
    """Run a program without a shell and without the user's own output formats."""
    own = ("SQUEUE_", "SINFO_", "SACCT_", "SLURM_TIME_FORMAT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"{command[0]} took more than {seconds:g} s")
    except OSError as error:
        return Answer(None, "", f"{command[0]}: {error.strerror}")
    fault = " ".join((done.stderr or done.stdout).split()) if done.returncode else ""
    return Answer(done.returncode, done.stdout if done.returncode == 0 else "", fault or "")


def records(text: str) -> list[dict[str, str]]:
    """Lines of ``scontrol -o show ...`` by key; a value ends at a blank."""
    return [dict(re.findall(r"(?:^|\s)([\w:/]+)=(\S*)", line)) for line in text.splitlines() if "=" in line]


def settings(text: str) -> dict[str, str]:
    """Lines ``Key = value`` of ``scontrol show config``."""
    return {m[1]: m[2] for m in re.finditer(r"^(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE)}
