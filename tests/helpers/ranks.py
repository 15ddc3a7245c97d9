"""Real processes that meet over a file, for tests: a rank that hangs or dies fails the test instead of blocking it."""

from __future__ import annotations

import gc
import io
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from helpers.forkserver import forkserver
from hpc_c2g.distributed.environment import LaunchEnvironment
from hpc_c2g.distributed.world import World


def _main(queue: Any, launch: LaunchEnvironment, function: Callable[..., Any], args: tuple) -> None:
    gc.freeze()  # what the server imported is garbage for no rank, and DeepSpeed collects often
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls deprecated collectives at every step
    try:
        world = World.start("cpu", deterministic=False, launch=launch, seconds=60)
        answer = io.BytesIO()  # tensors by value: the sender may be gone when the parent reads
        torch.save(function(world, *args), answer)
        queue.put((launch.rank, "value", answer.getvalue()))
    except BaseException as error:
        queue.put((launch.rank, type(error).__name__, f"{error}\n{traceback.format_exc()}"))


def run_ranks(
    count: int, folder: Path, function: Callable[..., Any], *args: Any, seconds: float = 120, nodes: int = 1
) -> list[tuple[str, Any]]:
    """Call ``function(world, *args)`` on ``count`` ranks; per rank ``("value", result)`` or ``(error name, text)``.

    ``nodes`` is how many the ranks believe that they are on.
    """
    local = count // nodes
    context = forkserver()
    queue = context.Queue()
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{count}-{len(list(folder.iterdir()))}"
    processes = [
        context.Process(
            target=_main,
            args=(queue, LaunchEnvironment("test", r, count, r % local, local, f"file://{meeting}"), function, args),
        )
        for r in range(count)
    ]
    for process in processes:
        process.start()
    results: dict[int, tuple[str, Any]] = {}
    end = time.monotonic() + seconds
    try:
        while len(results) < count and time.monotonic() < end:
            dead = [r for r, process in enumerate(processes) if process.exitcode not in (None, 0)]
            try:
                rank, kind, value = queue.get(timeout=0.2)
                if kind == "value":
                    value = torch.load(io.BytesIO(value), weights_only=False)
                results[rank] = (kind, value)
            except Empty:
                if all(r in results or r in dead for r in range(count)):
                    break
        return [results.get(r, ("no answer", processes[r].exitcode)) for r in range(count)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
