"""Measurement of this machine's hardware in a few seconds: operators, operator calls and all-reduces.

Nothing here trains: operators run one by one on synthetic tensors, so that the hardware is independent of the step that it
predicts. Their sizes are the step's, because rates depend on them. As many processes compute at once as there are cores, since
neighbors share caches and memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from hpc_c2g.distributed.environment import pick_device
from hpc_c2g.distributed.local import on_local_ranks
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.planning.hardware import HardwareSpec, LocalHardware
from hpc_c2g.training.cost.dry_run import MicroBatchCost
from hpc_c2g.training.cost.op_counter import Op, OpCounter, TensorShape
from hpc_c2g.units import GIB


@dataclass(frozen=True)
class Rates:
    """Measurements of one process: seconds and bytes.

    Attributes:
        products: Seconds of a step's matrix products, each as often as the step calls it.
        flops: Operations of these products.
        moves: Seconds of the memory-bound operators that move most of a step's bytes.
        moved: Bytes moved by these operators.
        call: Seconds per operator call.
        sums: (bytes, seconds) of all-reduces.
        runtime: Bytes of the process before its first computation.
    """

    products: float
    flops: float
    moves: float
    moved: float
    call: float
    sums: tuple[tuple[int, float], ...]
    runtime: float


def measure(choice: LocalHardware, cost: MicroBatchCost) -> HardwareSpec:
    """Measure this machine's hardware at the sizes of ``cost``.

    Raises:
        UserError: a process failed or timed out.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0))
    ranks = choice.ranks_per_node or gpus or cores
    count = max(2, ranks) if gpus != 1 else 1  # a link needs two processes
    active = min(ranks, cores)
    threads = min(torch.get_num_threads(), max(1, cores // active))
    device = pick_device("auto").type
    try:
        rates = on_local_ranks(count, measure_rates, cost, active, threads, choice.seconds, device=device)
    except UserError as error:
        raise UserError(
            f"hardware=here cannot be measured: {error.problem}", "give hardware_file=FILE, or hardware=h100"
        ) from error
    return hardware_of(rates, ranks)


def hardware_of(rates: Sequence[Rates], ranks: int) -> HardwareSpec:
    """Combine the measurements of a machine's processes; ``ranks`` of them will train."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores, count = len(os.sched_getaffinity(0)), len(rates)
    computing = [r for r in rates if r.moved]
    latency, bandwidth = fit_ring(rates[0].sums, count) if count > 1 else (0.0, 1e15)
    memory = torch.cuda.mem_get_info()[1] if gpus else _available_memory()
    link = {"gb_per_s": bandwidth / 1e9, "us": latency * 1e6}
    return HardwareSpec(
        name="here",
        ranks_per_node=ranks,
        memory_gib=memory / GIB,
        runtime_gib=statistics.mean(r.runtime for r in computing) / GIB,
        matrix_tflops=sum(r.flops for r in computing) / max(1e-9, sum(r.products for r in computing)) / 1e12,
        memory_gb_per_s=sum(r.moved for r in computing) / sum(r.moves for r in computing) / 1e9,
        operation_us=statistics.mean(r.call for r in computing) * 1e6,
        asynchronous=bool(gpus),
        cores=0 if gpus else cores,
        **{f"{place}_{k}": v for place in ("intra", "inter") for k, v in link.items()},
    )


def fit_ring(sums: Sequence[tuple[int, float]], ranks: int) -> tuple[float, float]:
    """Fit (l, B) of t = 2 (n - 1) l + 2 (n - 1)/n b / B by least squares on the relative errors; both are positive.

    Args:
        sums: (bytes, seconds) of all-reduces of at least two sizes.
        ranks: n, the number of ranks.
    """
    rows = torch.tensor([[2 * (ranks - 1) / t, 2 * (ranks - 1) / ranks * b / t] for b, t in sums]).double()
    solution = torch.linalg.lstsq(rows, torch.ones(len(rows), 1).double()).solution.flatten().tolist()
    smallest, largest = min(sums), max(sums)
    latency = solution[0] if solution[0] > 0 else smallest[1] / (2 * (ranks - 1))
    per_byte = solution[1] if solution[1] > 0 else largest[1] * ranks / (2 * (ranks - 1) * largest[0])
    return latency, 1 / per_byte


def measure_rates(world: World, cost: MicroBatchCost, active: int, threads: int, seconds: float) -> Rates:
    """Measure the rates of this rank; collective.

    Args:
        world: Ranks of the measurement.
        cost: Cost of a micro-batch, for its tensor sizes.
        active: Number of ranks that compute at once (the first ones), at most the number of cores.
        threads: Number of threads per rank.
        seconds: Approximate duration of each measurement.
    """
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):  # as a training process has
        import deepspeed  # noqa: F401
        import torch.utils.tensorboard

        import hpc_c2g.training.loop  # noqa: F401
    torch.set_num_threads(threads)
    torch.ones(8, 8, device=world.device) @ torch.ones(8, 8, device=world.device)
    torch.optim.Adam(
        [torch.zeros(1, requires_grad=True)]
    )  # the first optimizer imports a compiler, which stays in memory
    runtime = _runtime_bytes(world.device)
    sums = _sums(world, cost, seconds)
    measured = {"products": 0.0, "flops": 0.0, "moves": 0.0, "moved": 0.0, "call": 0.0}
    if world.size > 1:
        dist.barrier()
    if world.rank < active:
        products = [(o, n) for o, n in cost.operators if o.flops]
        moves = _most_of([(o, n) for o, n in cost.operators if not o.flops])
        measured = {
            "products": _replay(products, world.device, cost.working_bytes, seconds),
            "flops": sum(o.flops * n for o, n in products),
            "moves": _replay(moves, world.device, cost.working_bytes, seconds),
            "moved": sum(o.nbytes * n for o, n in moves),
            "call": _call_seconds(world.device, seconds / 4),
        }
    if world.size > 1:
        dist.barrier()
    return Rates(**measured, sums=sums, runtime=runtime)


def _most_of(operators: Sequence[tuple[Op, int]], part: float = 0.9) -> list[tuple[Op, int]]:
    """Operators that move the fraction ``part`` of all bytes, largest first."""
    ordered = sorted(operators, key=lambda pair: -pair[0].nbytes * pair[1])
    wanted, moved, kept = part * sum(o.nbytes * n for o, n in operators), 0.0, []
    for operator, count in ordered:
        if moved < wanted:
            kept.append((operator, count))
        moved += operator.nbytes * count
    return kept


def _replay(operators: Sequence[tuple[Op, int]], device: torch.device, memory: int, seconds: float) -> float:
    """Seconds of all the calls, with the memory access pattern of a step.

    Operands rotate, and results are kept until they fill as much memory as a step uses; then all results are freed at once. Caches
    are as cold as in a step, and the allocator returns memory to the system (whose fresh pages cost more than most operators) as often.
    """
    result = 0.0
    for operator, count in operators:
        copies = int(max(1, min(256, memory / operator.nbytes)))
        ring = [_operands(operator, device) for _ in range(min(16, copies))]
        function = functools.reduce(getattr, operator.name.split("."), torch.ops)

        def fill(function: Any = function, ring: list[Any] = ring, copies: int = copies) -> None:
            kept = [function(*given, **named) for given, named in (ring[i % len(ring)] for i in range(copies))]
            kept.clear()

        result += count * _seconds(fill, device, seconds / len(operators)) / copies
    return result


def _operands(operator: Op, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
    """Operands of ones (which stay finite under repeated in-place updates), and of zeros for indices."""

    def real(value: Any) -> Any:
        if isinstance(value, TensorShape):
            length = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride, strict=True))
            fill = int(value.dtype.is_floating_point)
            return torch.full((length,), fill, dtype=value.dtype, device=device).as_strided(value.shape, value.stride)
        return [real(v) for v in value] if isinstance(value, tuple) else value

    # the dry run has no device: use this one
    named = {name: device if name == "device" else real(value) for name, value in operator.keywords}
    return [real(value) for value in operator.arguments], named


def _call_seconds(device: torch.device, seconds: float) -> float:
    """Host seconds per operator of a small program on tiny tensors: forward, gradient with graph, second gradient.

    The program uses what a training step uses (modules called with given weights, a custom function, double backward), because Python's
    share of a call is larger than the operator's.
    """
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).to(device)
    weights = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    x = torch.ones(4, 4, device=device, requires_grad=True)

    def program() -> Tensor:
        y = functional_call(net, weights, (_Double.apply(x),))
        grads = torch.autograd.grad((y * y).sum(), list(weights.values()), create_graph=True)
        return torch.autograd.grad(torch.stack([(g * g).sum() for g in grads]).sum(), x)[0]

    with OpCounter() as meter:
        program()
    return _seconds(program, device, seconds) / float(meter.work.calls)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def _sums(world: World, cost: MicroBatchCost, seconds: float) -> tuple[tuple[int, float], ...]:
    """Time all-reduces from a few bytes to the step's sizes; all ranks make the same number of calls."""
    if world.size == 1:
        return ()
    largest = max(*cost.sums, 4 * cost.generator_parameters, 1 << 16)
    result = []
    for nbytes in sorted({64, 1 << 12, 1 << 16, max(1 << 16, largest // 8), largest}):
        bucket = torch.zeros(max(1, nbytes // 4), device=world.device)
        times = []
        for _ in range(max(8, min(100, int(seconds * 2e7 / (nbytes + 20_000))))):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(bucket)
            _wait(world.device)
            times.append(time.perf_counter() - began)
        result.append((bucket.numel() * 4, statistics.mean(times[2:])))
    return tuple(result)


def _seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Mean seconds of a call over about ``seconds``, after two calls to warm up.

    A single thread is timed by its CPU clock, so that other programs on the core do not count.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    call()
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    once = max(1e-7, time.perf_counter() - began)
    repeats = max(3, min(10_000, int(seconds / once)))
    began = clock()
    for _ in range(repeats):
        call()
    _wait(device)
    return (clock() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _runtime_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return float(total - free - torch.cuda.memory_allocated(device))
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # getrusage's maximum includes the parent's
    return float(pages * resource.getpagesize())


def _available_memory() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
