"""Checks of this machine for a study without a scheduler (``cluster=local``)."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from hpc_c2g.preflight.check_result import CheckResult
from hpc_c2g.scheduling.programs import Answer, query

TORCH = "import torch; print(torch.__version__, torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def check_host(seconds: float = 180.0) -> list[CheckResult]:
    """Check torch (in a child process), cores and memory.

    Args:
        seconds: Time limit of the import of torch.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        meminfo = ""
    torch = check_torch(query(sys.executable, "-c", TORCH, seconds=seconds), seconds)
    return [torch, check_memory(len(os.sched_getaffinity(0)), meminfo, _cgroup_free_bytes())]


def check_torch(answer: Answer, seconds: float) -> CheckResult:
    """Check that torch can be imported.

    Args:
        answer: Answer of ``python -c TORCH``.
        seconds: Its time limit.
    """
    if answer.code == 0:
        version, _, devices = answer.output.strip().rpartition(" ")
        return CheckResult("ok", f"Python {sys.version.split()[0]}, torch {version}, {devices} GPUs")
    if answer.code is None:
        hint = "check the load and the disk of this machine"
        return CheckResult("error", f"torch could not be imported within {seconds:g} s", hint)
    cause = re.findall(r"(\w*Error: .*?)(?= Traceback|$)", answer.fault)
    why = cause[-1] if cause else answer.fault[-200:] or f"exit code {answer.code}"
    return CheckResult("error", f"torch cannot be imported: {why}", f"{sys.executable} -m pip install torch")


def check_memory(cores: int, meminfo: str, cgroup_free: int | None = None) -> CheckResult:
    """Check that there is memory for one run per core; each has its own Python and torch.

    Args:
        cores: Cores that this process may use.
        meminfo: Text of /proc/meminfo.
        cgroup_free: Bytes left in the process's control group; None without a limit.
    """
    free = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if not free and cgroup_free is None:
        return CheckResult("unknown", f"{cores} cores; memory could not be read", "see `free -g`")
    limits = (int(free[1]) * 1024 if free else None, cgroup_free)
    gib = min(limit for limit in limits if limit is not None) / 2**30
    text = f"{cores} cores, {gib:.1f} GiB of memory free"
    if gib < 1:
        return CheckResult("error", f"{text}: too little for one run", "end other programs")
    if gib < cores:
        return CheckResult("warning", f"{text}: less than 1 GiB per run", f"parallel={int(gib)} at most")
    return CheckResult("ok", text)


def _cgroup_free_bytes() -> int | None:
    """Bytes left below the limit of the control group; None without a limit or without cgroup v2."""
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].splitlines()[0]
        folder = Path("/sys/fs/cgroup") / own.lstrip("/")
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError, IndexError):
        return None
