"""Interleaved timing, and the ceilings of a machine: matrix products per dtype, copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

CEILING_SIZES = {"cpu": (2048, 2**26), "cuda": (8192, 2**30)}
"""Side of the square matrix product, and bytes of the copy."""


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call, including its GPU work."""
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    """Synchronize the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every way in every round; the ways are interleaved, so that disturbances affect all alike."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warm_up):
        for name, call in ways.items():
            took = seconds(call)
            if number >= warm_up:
                taken[name].append(took)
    return taken


def undisturbed(taken: list[float]) -> float:
    """20th percentile of the seconds: the time of a call on an undisturbed machine."""
    return sorted(taken)[len(taken) // 5]


def product_rate(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> float:
    """Operations per second of a large square matrix product."""
    n = CEILING_SIZES[device.type][0]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / undisturbed(interleaved({"product": lambda: a @ b}, rounds)["product"])


def copy_rate(device: torch.device, rounds: int = 10) -> float:
    """Bytes per second, read and written, of a copy larger than the caches."""
    source = torch.empty(CEILING_SIZES[device.type][1] // 4, dtype=torch.float32, device=device).normal_()
    target: Tensor = torch.empty_like(source)
    return 8 * source.numel() / undisturbed(interleaved({"copy": lambda: target.copy_(source)}, rounds)["copy"])
