"""Launch environment of torchrun, srun or a single process: the only module that reads or writes it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from hpc_c2g.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST")
PORTS = range(20_000, 60_000)


@dataclass(frozen=True)
class LaunchEnvironment:
    """Rank and world of this process, as its launcher set them.

    Attributes:
        launcher: Name of the launcher: ``torchrun``, ``srun`` or ``single``.
        rank: Rank of this process, 0 .. world_size - 1.
        world_size: Number of processes of the job.
        local_rank: Rank of this process on its node.
        local_world_size: Number of processes on this node.
        master_address: Host of rank 0; None for a single process.
        master_port: Port on which rank 0 listens.
    """

    launcher: str = "single"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_address: str | None = None
    master_port: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size <= self.world_size):
            raise UserError(
                f"{self.launcher} set rank {self.rank} of {self.world_size} and local rank {self.local_rank} of"
                f" {self.local_world_size}, which contradict each other",
                "unset these variables, or let the launcher set them",
            )


def detect(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Read the launcher's variables; torchrun comes first, so that it works inside a Slurm allocation.

    Raises:
        UserError: variables of a launcher are missing, not numbers, or contradict each other.
    """
    environ = os.environ if environ is None else environ
    if any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        values = _complete(environ, TORCHRUN, "torchrun")
        rank, world, local, local_world, port = (_number(values, n) for n in TORCHRUN if n != "MASTER_ADDR")
        return LaunchEnvironment("torchrun", rank, world, local, local_world, values["MASTER_ADDR"], port)
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:  # a batch script itself is no job step
        values = _complete(environ, SRUN, "srun")
        rank, world, local, job, step = (_number(values, n) for n in SRUN if n != "SLURM_STEP_NODELIST")
        if world == 1:
            return LaunchEnvironment()
        # the same port for all tasks of a step, different ports for two steps of a job
        port = PORTS[(job * 97 + step) % len(PORTS)]
        local_world = _local_tasks(environ, local)
        master = first_host(values["SLURM_STEP_NODELIST"])
        return LaunchEnvironment("srun", rank, world, local, local_world, master, port)
    return LaunchEnvironment()


@dataclass(frozen=True)
class Allocation:
    """Scheduler job of this process.

    Attributes:
        job: Job id as Slurm's commands take it, such as ``123_4``.
        node: Host name of this process.
        restart: Number of times Slurm has restarted the job.
        rank: Rank of this process.
    """

    job: str
    node: str
    restart: int
    rank: int


def allocation(job: str | None = None, environ: Mapping[str, str] | None = None) -> Allocation:
    """Return the Slurm job of this process, or ``job`` without Slurm (None: the process id).

    Raises:
        UserError: the launcher's variables are incomplete or contradict each other.
    """
    environ = os.environ if environ is None else environ
    rank, node, slurm = detect(environ).rank, socket.gethostname(), environ.get("SLURM_JOB_ID")
    if job is not None or slurm is None:
        return Allocation(job or f"process {os.getpid()}", node, 0, rank)
    array, element = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{element}" if array and element else slurm
    restart = environ.get("SLURM_RESTART_COUNT", "0")
    return Allocation(name, node, int(restart) if restart.isdigit() else 0, rank)


def first_host(nodelist: str) -> str:
    """First name of a Slurm node list such as ``gpu[03-05,9],login1``.

    Raises:
        UserError: ``nodelist`` names no node.
    """
    match = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\])?([^,\[\]]*)", nodelist)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST={nodelist!r} names no node", "start the program with srun")
    return "".join(part or "" for part in match.groups())


def _complete(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> dict[str, str]:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        there = [name for name in names if environ.get(name)]
        raise UserError(
            f"the environment of {launcher} is incomplete: {', '.join(there)} set, {', '.join(missing)} missing",
            f"start with {launcher}, or unset {', '.join(there)} for a single process",
        )
    return {name: environ[name] for name in names}


def _number(values: Mapping[str, str], name: str) -> int:
    try:
        return int(values[name])
    except ValueError:
        raise UserError(f"{name}={values[name]!r} is no number", "unset it, or let the launcher set it") from None


def _local_tasks(environ: Mapping[str, str], local: int) -> int:
    """Tasks of the step on this node from ``SLURM_STEP_TASKS_PER_NODE`` (such as ``2(x3),1``)."""
    layout = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    node = int(environ.get("SLURM_NODEID", "0"))
    counts: list[int] = []
    for count, _, repeat in re.findall(r"(\d+)(\(x(\d+)\))?", layout):
        counts += [int(count)] * int(repeat or 1)
    return counts[node] if node < len(counts) else local + 1


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device ``name``; ``auto`` takes the GPU of the local rank if there is one.

    Raises:
        UserError: ``cuda`` without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch sees no GPU", "use device=cpu or device=auto")
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def prepare_libraries(device: torch.device, deterministic: bool) -> None:
    """Set library options that must be set before DeepSpeed is imported or CUDA is initialized.

    Deterministic runs compute on one thread, because the order of a sum may depend on the number of threads.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for an accelerator otherwise
    else:
        torch.cuda.set_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_num_threads(1)
    # the call imports a compiler, which takes more than a second
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)


@contextlib.contextmanager
def deepspeed_variables(launch: LaunchEnvironment, device: torch.device) -> Iterator[None]:
    """Context that sets the variables DeepSpeed reads while it builds an engine; restored, since children must not inherit them."""
    wanted = {
        "RANK": launch.rank,
        "LOCAL_RANK": launch.local_rank
        if device.index is None
        else device.index,  # DeepSpeed takes the GPU of this index
        "WORLD_SIZE": launch.world_size,
        "LOCAL_SIZE": launch.local_world_size,
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: str(value) for name, value in wanted.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


RECORDED = (
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST",
    "SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_ALGO", "NCCL_PROTO", "GLOO_SOCKET_IFNAME",
)  # fmt: skip
"""Variables that may be recorded: an environment also holds tokens and passwords."""


def recorded(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of ``RECORDED`` that are set, for the run's record."""
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in RECORDED if name in environ}
