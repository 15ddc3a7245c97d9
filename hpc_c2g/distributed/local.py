"""Processes of this machine that meet over a file and call one function together."""

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
    """What ``function(world, *arguments)`` returns on each of ``count`` new processes, in the order of ranks.

    Raises:
        UserError: one of them failed, ended, or gave no answer within ``seconds``; none of them is left behind.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        launches = [LaunchEnvironment("local", r, count, r, count, meeting) for r in range(count)]
        processes = [
            context.Process(target=_main, args=(queue, launch, device, function, arguments)) for launch in launches
        ]
        try:
            for process in processes:
                process.start()
            return _answers(queue, processes, seconds)
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


def _answers(queue: Any, processes: Sequence[Any], seconds: float) -> list[Any]:
    answers: dict[int, Any] = {}
    end = time.monotonic() + seconds
    while len(answers) < len(processes):
        try:
            rank, fault, answer = queue.get(timeout=0.2)
        except Empty:
            lost = [r for r, p in enumerate(processes) if r not in answers and p.exitcode is not None]
            if not lost and time.monotonic() < end:
                continue
            rank = lost[0] if lost else next(r for r in range(len(processes)) if r not in answers)
            fault = "ended without an answer" if lost else f"gave no answer within {seconds:.0f} s"
        if fault:
            raise UserError(f"process {rank} of {len(processes)}: {fault}", "look at its messages above")
        answers[rank] = answer
    return [answers[r] for r in range(len(processes))]


def _main(
    queue: Any, launch: LaunchEnvironment, device: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        world = World.start(device, deterministic=False, launch=launch, seconds=60)
        queue.put((launch.rank, "", function(world, *arguments)))
    except BaseException as error:  # of any kind: the parent tells it
        queue.put((launch.rank, " ".join(f"{type(error).__name__}: {error}".split()), None))
