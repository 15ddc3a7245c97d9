"""How programs, above all Slurm's, are run and asked, and what their words say."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

PATIENCE = 20.0
"""Seconds after which a command counts as not answered."""
USER_FORMAT_VARS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SLURM_TIME_FORMAT")
"""Variables of the user's own output formats, which would change an answer."""
Record = Mapping[str, str]


class Answer(NamedTuple):
    """What a program said; ``code`` is None where it is missing or did not end in time."""

    code: int | None
    output: str
    fault: str


def run(command: Sequence[str], seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program without a shell, without input and without ``USER_FORMAT_VARS``, with further ``variables`` of its environment.

    Raises:
        OSError: it is missing.
        subprocess.TimeoutExpired: it did not end in time.
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


def ask(*command: str, seconds: float = PATIENCE) -> Answer:
    """What a program says; nothing that goes wrong is raised."""
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
    """Lines of ``scontrol -o show ...`` by key; a value ends at a blank."""
    return [dict(re.findall(r"(?:^|\s)([\w:/]+)=(\S*)", line)) for line in text.splitlines() if "=" in line]


def settings(text: str) -> dict[str, str]:
    """Lines ``Key = value`` of ``scontrol show config``."""
    return {m[1]: m[2] for m in re.finditer(r"^(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE)}
