"""``python -m benchmarks.memory [--quick]``: peak memory against the global batch, at one micro-batch size and with the joint graph.

Each row runs in a process of its own. ``tensors`` is the most that a step's tensors held at once, by PyTorch's own account. ``step`` is
what steps add to what the process held before: on a GPU by the allocator, on the CPU by the resident set, which keeps what the C
library does not give back. ``process`` is all of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import show, write_result
from benchmarks.subject import Step, classifier, joint_step, our_step
from hpc_c2g.distributed.local import on_local_ranks
from hpc_c2g.distributed.world import World
from hpc_c2g.training.config.train import TrainConfig

MIB = 2**20
MICRO_BATCH = 1024


def peak(world: World, joint: bool, batch: int, width: int) -> tuple[float, float, float]:
    """Peak bytes of a step: its tensors, the growth over two steps, and the whole process."""
    bundle = classifier(width=width)
    settings: dict[str, Any] = {"steps": 10**6, "device": world.device.type}
    warm = TrainConfig(global_batch=10, **settings)
    whole = TrainConfig(global_batch=batch, micro_batch=None if joint else min(batch, MICRO_BATCH), **settings)
    make = joint_step if joint else our_step
    make(bundle, warm)(1)  # loads the libraries' kernels
    step: Step = make(bundle, whole)
    before = peak_bytes(world.device, reset=True)
    for number in (1, 2):
        step(number)
    most = peak_bytes(world.device, reset=False)
    return live_bytes(lambda: step(3)), most - before, most


def live_bytes(step: Callable[[], object]) -> float:
    """Peak bytes that PyTorch's allocator added during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    live = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return float(most)


def peak_bytes(device: torch.device, reset: bool) -> float:
    """Peak bytes since the last reset; with ``reset`` the bytes held now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.max_memory_allocated())
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the resident set
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024.0 * int(fields["VmHWM"].split()[0])


def main() -> None:
    """Print the table, write ``results/memory.json``, and fail where memory grows with the batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a narrow net and small batches: see that it works")
    quick = parser.parse_args().quick
    gpu = torch.cuda.is_available()
    width = 100 if quick else 1000
    # from two micro-batches on: one alone is one pass, which has no sum of G beside its own
    batches = [2048, 4096] if quick else [2048, 4096, 16384, 65536, *([1_048_576] if gpu else [])]
    rows: list[dict[str, Any]] = []
    for name, joint in (("two passes", False), ("joint graph", True)):
        for batch in batches:
            if joint and batch > 16384 and not gpu:
                continue
            tensors, added, process = on_local_ranks(
                1, peak, joint, batch, width, device="cuda" if gpu else "cpu", seconds=1800
            )[0]
            first = next((row for row in rows if row["way"] == name), None)
            rows.append(
                {
                    "way": name,
                    "global batch": batch,
                    "tensors MiB": tensors / MIB,
                    "step MiB": added / MIB,
                    "process MiB": process / MIB,
                    "x tensors": tensors / MIB / (first["tensors MiB"] if first else tensors / MIB),
                    "x process": process / MIB / (first["process MiB"] if first else process / MIB),
                }
            )
            print(f"{name}, batch {batch}: {added / MIB:.0f} MiB", flush=True)
    show(f"784-{width}-{width}-10, micro-batch {MICRO_BATCH}", rows)
    growth = max(max(r["x tensors"], r["x process"]) for r in rows if r["way"] == "two passes")
    settings = {"quick": quick, "width": width, "micro_batch": MICRO_BATCH}
    print(f"written: {write_result('memory', settings, rows=rows)}")
    if growth > 1.1 and not quick:
        sys.exit(f"memory grows with the global batch: x {growth:.2f}")


if __name__ == "__main__":
    main()
