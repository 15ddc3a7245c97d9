"""Files through which the login node and the ranks of the doctor's job communicate; both sides import this module."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hpc_c2g
from hpc_c2g.files import write_atomically

PLAN, EPILOG = "plan.json", "epilog.json"
REPORT, PING, REPLY = "rank-", "ping-", "reply-"
"""Prefixes of the files of one rank; each ends in .json."""
REPLY_TIMEOUT_S = 60.0
"""Longest time that a file system may cache the attributes of a file."""
POLL_S = 0.1


def versions() -> dict[str, str]:
    """Versions of what results depend on. Libraries are not imported, since that takes seconds."""
    found = {"hpc_c2g": hpc_c2g.__version__, "python": platform.python_version(), "code": code_digest()}
    for library in ("torch", "deepspeed"):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "missing"
    return found


def code_digest() -> str:
    """Return a hash of the package's source files: a node with another checkout computes other results."""
    digest, package = hashlib.sha256(), Path(hpc_c2g.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def clock_offset(folder: Path, tries: int = 3) -> tuple[float, float]:
    """Compare this machine's clock with that of the file system.

    Returns:
        Seconds that this clock is ahead, and the largest error of that number.
    """
    scratch = folder / f".clock-{uuid.uuid4().hex}"
    best = (0.0, float("inf"))
    try:
        for _ in range(tries):
            before = time.time()
            scratch.touch()
            os.utime(scratch)
            after = time.time()
            error = (after - before) / 2
            if error < best[1]:
                best = ((before + after) / 2 - scratch.stat().st_mtime, error)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return best


def ping_login_node(folder: Path, name: str, seconds: float) -> dict[str, float | None]:
    """Write a ping and wait for the login node's reply.

    Args:
        folder: Folder of the job.
        name: Name of this rank's files.
        seconds: Longest time to wait.

    Returns:
        Times of the ping (``sent``), of the reply by the login node's clock (``answered``) and of its arrival (``received``); the
        last two are None if no reply came.
    """
    token, end = uuid.uuid4().hex, time.monotonic() + seconds
    sent = time.time()
    write_atomically(folder / f"{PING}{name}.json", json.dumps({"token": token, "sent": sent}).encode())
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            reply = json.loads((folder / f"{REPLY}{name}.json").read_text())
            if reply["token"] == token:
                return {"sent": sent, "answered": reply["answered"], "received": time.time()}
        time.sleep(POLL_S)
    return {"sent": sent, "answered": None, "received": None}


def answer_pings(folder: Path, answered: dict[str, str]) -> None:
    """Reply to every new ping; called by the login node.

    Args:
        folder: Folder of the job.
        answered: Token that was answered last, by file name; updated.
    """
    for file in folder.glob(f"{PING}*.json"):
        name = file.name.removeprefix(PING)
        with contextlib.suppress(OSError, ValueError):
            token = json.loads(file.read_text())["token"]
            if answered.get(name) != token:
                reply = {"token": token, "answered": time.time()}
                write_atomically(folder / f"{REPLY}{name}", json.dumps(reply).encode())
                answered[name] = token


def read_reports(folder: Path) -> list[Mapping[str, Any]]:
    """Reports that ranks have written so far."""
    reports = []
    for file in sorted(folder.glob(f"{REPORT}*.json")):
        with contextlib.suppress(OSError, ValueError):
            reports.append(json.loads(file.read_text()))
    return reports
