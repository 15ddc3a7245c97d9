"""What this machine lacks to run a study by itself (``cluster=local``)."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from hpc_c2g.preflight.check_result import CheckResult
from hpc_c2g.scheduling.programs import Answer, query

TORCH = "import torch; print(torch.__version__, torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def check_host(seconds: float = 180.0) -> list[CheckResult]:
    """What ``cluster=local`` needs: Python, torch (in a process of its own), cores and memory."""
    version = ".".join(map(str, sys.version_info[:3]))
    found = [check_python(version)]
    found.append(check_torch(query(sys.executable, "-c", TORCH, seconds=seconds), seconds))
    try:
        memory = Path("/proc/meminfo").read_text()
    except OSError:
        memory = ""
    return [*found, check_memory(len(os.sched_getaffinity(0)), memory, _cgroup_room())]


def check_python(version: str) -> CheckResult:
    """Whether the package runs on it."""
    if tuple(map(int, version.split(".")[:2])) < (3, 10):
        return CheckResult("error", f"Python {version} is too old", "make an environment with Python >= 3.10")
    return CheckResult("ok", f"Python {version}")


def check_torch(answer: Answer, seconds: float) -> CheckResult:
    """Whether it can be imported."""
    if answer.code == 0:
        version, _, devices = answer.output.strip().rpartition(" ")
        return CheckResult("ok", f"torch {version}, {devices} GPUs")
    if answer.code is None:
        hint = "look at the load and the disk of this machine"
        return CheckResult("error", f"torch could not be imported within {seconds:g} s", hint)
    cause = re.findall(r"(\w*Error: .*?)(?= Traceback|$)", answer.fault)
    what = f"torch cannot be imported: {cause[-1] if cause else answer.fault[-200:] or f'exit code {answer.code}'}"
    return CheckResult("error", what, f"{sys.executable} -m pip install torch")


def check_memory(cores: int, meminfo: str, room: int | None = None) -> CheckResult:
    """Whether one run per core has room: each has its own Python and torch.

    Args:
        cores: that this process may use.
        meminfo: /proc/meminfo.
        room: bytes that the process's control group may still take, if it has a limit.
    """
    free = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if not free and room is None:
        return CheckResult("unknown", f"{cores} cores; memory could not be read", "see `free -g`")
    most = min(b for b in (int(free[1]) * 1024 if free else None, room) if b is not None) / 2**30
    told = f"{cores} cores, {most:.1f} GiB of memory free"
    if most < 1:
        return CheckResult("error", f"{told}: too little for one run", "end other programs")
    if most < cores:
        return CheckResult("warning", f"{told}: less than 1 GiB per run", f"parallel={int(most)} at most")
    return CheckResult("ok", told)


def _cgroup_room() -> int | None:
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].splitlines()[0]
        folder = Path("/sys/fs/cgroup") / own.lstrip("/")
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError, IndexError):  # no limit, or none of version 2
        return None
