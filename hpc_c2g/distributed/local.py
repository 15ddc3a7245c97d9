"""Run a function on several local ranks, in processes that rendezvous through a file."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any, TypeVar

from hpc_c2g.distributed.environment import LaunchEnvironment
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError

T = TypeVar("T")


def on_local_ranks(
    count: int, function: Callable[..., T], *arguments: Any, device: str = "cpu", seconds: float = 180
) -> list[T]:
    """Call ``function(world, *arguments)`` on each of ``count`` new processes and return the results in rank order.

    Raises:
        UserError: a process failed, ended, or returned nothing within ``seconds``; all processes are ended.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        launches = [LaunchEnvironment("local", r, count, r, count, rendezvous) for r in range(count)]
        processes = [
            context.Process(target=_main, args=(queue, launch, device, function, arguments)) for launch in launches
        ]
        try:
            for process in processes:
                process.start()
            return _collect_results(queue, processes, seconds)
        except BaseException:
            for process in processes:
                if process.pid is not None:
                    process.kill()
            raise
        finally:
            for process in processes:
                if process.pid is not None:
                    process.join(5)
                    process.kill()


def _collect_results(queue: Any, processes: Sequence[Any], seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + seconds
    while len(results) < len(processes):
        try:
            rank, fault, result = queue.get(timeout=0.2)
        except Empty:
            lost = [r for r, p in enumerate(processes) if r not in results and p.exitcode is not None]
            if not lost and time.monotonic() < end:
                continue
            rank = lost[0] if lost else next(r for r in range(len(processes)) if r not in results)
            fault = "ended without a result" if lost else f"returned nothing within {seconds:.0f} s"
        if fault:
            raise UserError(f"process {rank} of {len(processes)}: {fault}", "read its messages above")
        results[rank] = result
    return [results[r] for r in range(len(processes))]


def _main(
    queue: Any, launch: LaunchEnvironment, device: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        world = World.start(device, deterministic=False, launch=launch, seconds=60)
        queue.put((launch.rank, "", function(world, *arguments)))
    except BaseException as error:  # any exception is reported by the parent
        queue.put((launch.rank, " ".join(f"{type(error).__name__}: {error}".split()), None))
