"""Tests of a node's processors and GPUs; each returns what it found as plain data."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def probe_devices(local_rank: int, local_size: int) -> dict[str, Any]:
    """Count the node's GPUs and test them, each GPU by one rank of the node and the CPU by all.

    Returns:
        ``count`` of GPUs, ``faults`` of devices, CUDA version that torch is ``built_for``, ``cause`` if CUDA does not start, and
        ``ecc``, the uncorrected memory errors of each GPU (from local rank 0).
    """
    import torch

    found: dict[str, Any] = {"count": 0, "faults": [], "built_for": torch.version.cuda, "cause": ""}
    if torch.cuda.is_available():
        found["count"] = torch.cuda.device_count()
    elif torch.version.cuda:
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            found["cause"] = str(error).splitlines()[0]
    own = [torch.device("cuda", i) for i in range(local_rank, found["count"], local_size)]
    for device in [torch.device("cpu"), *own]:
        fault = matmul_fault(device)
        if fault:
            found["faults"].append(f"{device}: {fault}")
    found["ecc"] = ecc_errors() if local_rank == 0 else {}
    return found


def matmul_fault(device: torch.device, size: int = 256) -> str:
    """Multiply two matrices of small integers, which every precision does exactly; return the error, or an empty text."""
    import torch

    left = (torch.arange(size * size).reshape(size, size) * 7) % 5
    right = (torch.arange(size * size).reshape(size, size) * 3) % 4
    try:
        product = left.to(device, torch.float32) @ right.to(device, torch.float32)
        wrong = int((product.cpu().long() != left @ right).sum())
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return f"{wrong} of {size * size} elements of a matrix product are wrong" if wrong else ""


def ecc_errors(seconds: float = 20.0) -> dict[str, int]:
    """Uncorrected memory errors of each GPU since its driver started, by ``index (uuid)``; empty without nvidia-smi or ECC."""
    query = "index,uuid,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return {f"{row[0]} ({row[1]})": int(row[2]) for row in rows if len(row) == 3 and row[2].isdecimal()}
