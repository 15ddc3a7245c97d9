"""The profile of the machine that runs this, measured in some seconds: products, copies, operator calls and all-reduces.

Nothing here trains: the numbers are independent of the step that they predict. The sizes are the step's own, because rates depend
on them. As many processes compute at once as there are cores, since neighbours share caches and memory.
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
from torch import Tensor

from hpc_c2g.distributed.environment import pick_device
from hpc_c2g.distributed.local import on_local_ranks
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import C2GError
from hpc_c2g.planning.profile import GIB, ClusterProfile, Here
from hpc_c2g.training.dry_run import MicroBatchCost
from hpc_c2g.training.meter import Meter, Product, TensorShape


@dataclass(frozen=True)
class Rates:
    """What one process measured: seconds and bytes.

    Attributes:
        products: seconds of all products of a step, each as often as the step calls it.
        flops: of those.
        bandwidth: bytes per second.
        call: seconds per operator.
        sums: (bytes, seconds) of all-reduces.
        runtime: bytes of the process before it computed.
    """

    products: float
    flops: float
    bandwidth: float
    call: float
    sums: tuple[tuple[int, float], ...]
    runtime: float


def measure(choice: Here, cost: MicroBatchCost) -> ClusterProfile:
    """The profile of this machine at the sizes of ``cost``.

    Raises:
        C2GError: a process died or did not answer in time.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0))
    ranks = choice.ranks_per_node or gpus or cores
    count = max(2, ranks) if gpus != 1 else 1  # a link needs two ends
    active = min(ranks, cores)
    threads = min(torch.get_num_threads(), max(1, cores // active))
    device = pick_device("auto").type
    try:
        rates = on_local_ranks(count, measure_rates, cost, active, threads, choice.seconds, device=device)
    except C2GError as error:
        raise C2GError(
            f"cluster=here cannot be measured: {error.what}", "give profile=FILE, or cluster=h100"
        ) from error
    return profile_of(rates, ranks)


def profile_of(rates: Sequence[Rates], ranks: int) -> ClusterProfile:
    """The profile of a machine from what its processes measured; ``ranks`` of them will train."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores, count = len(os.sched_getaffinity(0)), len(rates)
    computing = [r for r in rates if r.bandwidth]
    latency, bandwidth = fit_ring(rates[0].sums, count) if count > 1 else (0.0, 1e15)
    memory = torch.cuda.mem_get_info()[1] if gpus else _available_memory()
    link = {"gb_per_s": bandwidth / 1e9, "us": latency * 1e6}
    return ClusterProfile(
        name="here",
        ranks_per_node=ranks,
        memory_gib=memory / GIB,
        runtime_gib=statistics.mean(r.runtime for r in computing) / GIB,
        matrix_tflops=sum(r.flops for r in computing) / max(1e-9, sum(r.products for r in computing)) / 1e12,
        memory_gb_per_s=statistics.mean(r.bandwidth for r in computing) / 1e9,
        operation_us=statistics.mean(r.call for r in computing) * 1e6,
        asynchronous=bool(gpus),
        cores=0 if gpus else cores,
        **{f"{place}_{k}": v for place in ("intra", "inter") for k, v in link.items()},
    )


def fit_ring(sums: Sequence[tuple[int, float]], members: int) -> tuple[float, float]:
    """(l, B) of t = 2 (n - 1) l + 2 (n - 1)/n b / B, by least squares on the relative errors; both positive.

    Args:
        sums: (bytes, seconds) of all-reduces of at least two sizes.
        members: n.
    """
    rows = torch.tensor([[2 * (members - 1) / t, 2 * (members - 1) / members * b / t] for b, t in sums]).double()
    solution = torch.linalg.lstsq(rows, torch.ones(len(rows), 1).double()).solution.flatten().tolist()
    smallest, largest = min(sums), max(sums)
    latency = solution[0] if solution[0] > 0 else smallest[1] / (2 * (members - 1))
    per_byte = solution[1] if solution[1] > 0 else largest[1] * members / (2 * (members - 1) * largest[0])
    return latency, 1 / per_byte


def measure_rates(world: World, cost: MicroBatchCost, active: int, threads: int, seconds: float) -> Rates:
    """What one of the ranks measures; all call it together.

    Args:
        world: the ranks.
        cost: of a step, for its sizes.
        active: ranks that compute at once, the first ones; no more than there are cores.
        threads: of each.
        seconds: about how long each rate is measured.
    """
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):  # as a training process has
        import deepspeed  # noqa: F401
        import torch.utils.tensorboard

        import hpc_c2g.training.loop  # noqa: F401
    torch.set_num_threads(threads)
    torch.ones(8, 8, device=world.device) @ torch.ones(8, 8, device=world.device)
    runtime = _runtime_bytes(world.device)
    sums = _sums(world, cost, seconds)
    products = flops = bandwidth = call = 0.0
    if world.size > 1:
        dist.barrier()
    if world.rank < active:
        call = _call_seconds(world.device, seconds / 4)
        bandwidth = _bandwidth(world.device, cost, seconds / 4)
        products = _product_seconds(world.device, cost, seconds)
        flops = sum(p.flops * n for p, n in cost.products)
    if world.size > 1:
        dist.barrier()
    return Rates(products, flops, bandwidth, call, sums, runtime)


def _product_seconds(device: torch.device, cost: MicroBatchCost, seconds: float) -> float:
    """All matrix products of a step, each called again on numbers of its own."""
    total = sum(p.flops * n for p, n in cost.products)
    result = 0.0
    for product, count in cost.products:
        operands = _operands(product, device)
        share = seconds * product.flops * count / max(total, 1)
        operator = operator_of(product)
        result += count * _seconds(lambda f=operator, o=operands: f(*o), device, share)  # type: ignore[misc]
    return result


def operator_of(product: Product) -> Any:
    """The operator by its name below ``torch.ops``."""
    return functools.reduce(getattr, product.operator.split("."), torch.ops)


def _operands(product: Product, device: torch.device) -> list[Any]:
    def real(value: Any) -> Any:
        if isinstance(value, TensorShape):
            tensor = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=device)
            return tensor.normal_() if value.dtype.is_floating_point else tensor.zero_()
        return [real(v) for v in value] if isinstance(value, tuple) else value

    return [real(value) for value in product.arguments]


def _bandwidth(device: torch.device, cost: MicroBatchCost, seconds: float) -> float:
    """a b into a new tensor, through a ring of operands as large as a step's working set; 3 tensors per call."""
    numbers = max(256, cost.stream_bytes // 12)
    ring = [torch.ones(numbers, device=device) for _ in range(max(2, min(256, cost.working_bytes // (4 * numbers))))]
    place = 0

    def call() -> None:
        nonlocal place
        place = (place + 1) % len(ring)
        torch.mul(ring[place], ring[place - 1])

    return 12 * numbers / _seconds(call, device, seconds)


def _call_seconds(device: torch.device, seconds: float) -> float:
    """Per operator of a little program of tiny tensors, forward, backward and backward of the backward."""
    w, x = (torch.ones(4, 4, device=device, requires_grad=True) for _ in range(2))

    def program() -> Tensor:
        y = ((x @ w.t()).relu() * w + x).tanh().sum()
        (g,) = torch.autograd.grad(y, w, create_graph=True)
        return torch.autograd.grad((g * g).sum(), x)[0]

    with Meter() as meter:
        program()
    return _seconds(program, device, seconds) / float(meter.work.calls)


def _sums(world: World, cost: MicroBatchCost, seconds: float) -> tuple[tuple[int, float], ...]:
    """All-reduces of a few bytes to the step's own sizes; all ranks make the same number of calls."""
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
    """Mean seconds of a call over about ``seconds``, two calls to warm up: who is interrupted here, is interrupted in a step."""
    call()
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    once = max(1e-7, time.perf_counter() - began)
    repeats = max(3, min(10_000, int(seconds / once)))
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - began) / repeats


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
