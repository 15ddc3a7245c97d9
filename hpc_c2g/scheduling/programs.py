"""Calls of programs, above all Slurm's, and parsers of their output."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

TIMEOUT_S = 20.0
"""Seconds after which a program counts as not answered."""
USER_FORMAT_VARS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SLURM_TIME_FORMAT")
"""Prefixes of variables that set the user's own output formats, which would change an answer."""
Record = Mapping[str, str]


class Answer(NamedTuple):
    """Answer of a program.

    Attributes:
        code: Exit code; None if the program is missing or did not end in time.
        output: Standard output if the code is 0, else empty.
        fault: Error in one line; empty if the code is 0.
    """

    code: int | None
    output: str
    fault: str


def run(command: Sequence[str], seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program without a shell, without input and without ``USER_FORMAT_VARS``; ``variables`` are added to its environment.

    Raises:
        OSError: The program is missing.
        subprocess.TimeoutExpired: It did not end in time.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(USER_FORMAT_VARS)}
    return subprocess.run(
        command,
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
    )


def query(*command: str, seconds: float = TIMEOUT_S) -> Answer:
    """Return a program's answer; nothing that goes wrong is raised."""
    try:
        done = run(command, seconds)
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"{command[0]} took more than {seconds:g} s")
    except OSError as error:
        return Answer(None, "", f"{command[0]}: {error.strerror}")
    if done.returncode == 0:
        return Answer(0, done.stdout, "")
    return Answer(done.returncode, "", " ".join((done.stderr or done.stdout).split()))


def records(text: str) -> list[dict[str, str]]:
    """Parse lines of ``scontrol -o show ...`` into values by key; a value ends at a blank."""
    return [dict(re.findall(r"(?:^|\s)([\w:/]+)=(\S*)", line)) for line in text.splitlines() if "=" in line]


def settings(text: str) -> dict[str, str]:
    """Parse lines ``Key = value`` of ``scontrol show config``."""
    return {m[1]: m[2] for m in re.finditer(r"^(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE)}
