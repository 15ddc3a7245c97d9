"""The process group of a job: rendezvous, collectives on Python objects, and errors that name a lost rank."""

from __future__ import annotations

import atexit
import functools
import gc
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# the public torch.distributed re-exports these classes without types
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, TCPStore

from hpc_c2g.distributed.environment import LaunchEnvironment, detect, pick_device, prepare_libraries
from hpc_c2g.errors import UserError

T = TypeVar("T")
RENDEZVOUS_SECONDS = 120.0
COLLECTIVE_SECONDS = 1800.0
ROLL_CALL_SECONDS = 5.0


@dataclass(frozen=True)
class World:
    """One process's view of the job's process group.

    Attributes:
        launch: Rank and world size of this process.
        device: Device of this process.
        store: Key-value store of the rendezvous.
    """

    launch: LaunchEnvironment
    device: torch.device
    store: Any

    @classmethod
    def start(
        cls,
        device: str,
        deterministic: bool,
        launch: LaunchEnvironment | None = None,
        seconds: float = RENDEZVOUS_SECONDS,
    ) -> World:
        """Join the process group (gloo on CPU, nccl on GPU).

        Raises:
            UserError: the launch environment is inconsistent, or ranks are missing after ``seconds`` (the message names them).
        """
        launch = launch or detect()
        place = pick_device(device, launch.local_rank)
        prepare_libraries(place, deterministic)
        return cls(launch, place, _open_group(launch, "nccl" if place.type == "cuda" else "gloo", seconds))

    @classmethod
    def single_process(cls, device: torch.device) -> World:
        """Return a world of one process, whatever the launch environment."""
        return cls(LaunchEnvironment(), device, HashStore())

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self.launch.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.launch.world_size

    @property
    def is_rank0(self) -> bool:
        """True on rank 0, which writes files and logs for all ranks."""
        return self.launch.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over ranks: one all-reduce of one flat bucket, the same bits on every rank."""
        if self.size == 1 or not tensors:
            return
        bucket = torch.cat([t.reshape(-1) for t in tensors])
        self.with_rank_check(lambda: dist.all_reduce(bucket))
        for tensor, part in zip(tensors, torch.split(bucket, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's ``[n, P]``, stacked in rank order: ``[world_size n, P]``."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self.with_rank_check(lambda: dist.all_gather(parts, tensor))
        return torch.cat(parts)

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's value (plain data or CPU tensors) in rank order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            self.with_rank_check(lambda: dist.all_gather_object(values, value))
        return values

    def gather_to_rank0(self, value: T) -> list[T]:
        """Return every rank's value in rank order on rank 0, an empty list on the other ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_rank0 else None
        self.with_rank_check(lambda: dist.gather_object(value, values))
        return values or []

    def any_rank(self, flag: str | None) -> str | None:
        """Return the flag of the lowest rank that raised one, on every rank; None if no rank did."""
        if self.size == 1:
            return flag
        raised = torch.tensor([1.0 if flag else 0.0], device=self.device)
        self.with_rank_check(lambda: dist.all_reduce(raised))
        if not bool(raised):
            return None
        return next((f for f in self.all_gather_object(flag) if f), None)

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """Return rank 0's ``make()`` on every rank; its UserError is raised on every rank.

        The value must be plain data if there are several ranks.
        """
        if self.size == 1:
            return make()
        message: list[Any] = [None]
        if self.is_rank0:
            try:
                message[0] = ("value", make())
            except UserError as error:
                message[0] = ("error", error.problem, error.hint)
            except BaseException as error:
                message[0] = ("error", f"rank 0 failed: {error!r}", "read its log")
                dist.broadcast_object_list(message, 0)
                raise
        self.with_rank_check(lambda: dist.broadcast_object_list(message, 0))
        if message[0][0] == "error":
            raise UserError(*message[0][1:])
        value: T = message[0][1]
        return value

    def raise_on_all_ranks(self, make: Callable[[], T]) -> T:
        """Return this rank's ``make()``; a UserError of any rank (the lowest one's) is raised on every rank.

        ``make`` may be collective as long as it fails between its collectives on all ranks or on none.
        """
        if self.size == 1:
            return make()
        value: Any = None
        fault: tuple[str, str] | None = None
        try:
            value = make()
        except UserError as error:
            fault = (error.problem, error.hint)
        first = next((f for f in self.all_gather_object(fault) if f), None)
        if first:
            raise UserError(*first)
        result: T = value
        return result

    def with_rank_check(self, collective: Callable[[], Any]) -> None:
        """Run a collective; if it fails, find the ranks that no longer respond and name them.

        Raises:
            UserError: ranks are gone.
        """
        try:
            collective()
        except RuntimeError as error:
            missing = self._roll_call()
            if not missing:
                raise
            raise UserError(
                f"rank {', '.join(map(str, missing))} of {self.size} is gone ({str(error).splitlines()[0]})",
                "read that rank's log; the same command resumes from the last checkpoint",
            ) from error

    def _roll_call(self) -> list[int]:
        """Ranks that do not respond within ``ROLL_CALL_SECONDS``; the store may be lost with rank 0."""
        try:
            self.store.set(f"here/{self.rank}", "1")
            return _absent(self.store, "here", self.size, ROLL_CALL_SECONDS)
        except RuntimeError:
            return [0]


def _absent(store: Any, key: str, world_size: int, seconds: float) -> list[int]:
    """Ranks whose ``key/rank`` is not in the store after ``seconds``; returns as soon as all are."""
    end = time.monotonic() + seconds
    absent = list(range(world_size))
    while absent:
        absent = [rank for rank in absent if not store.check([f"{key}/{rank}"])]
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    return absent


@functools.cache
def _open_group(launch: LaunchEnvironment, backend: str, seconds: float) -> Any:
    """Initialize the process group once per process (DeepSpeed keeps handles to it); returns the rendezvous store."""
    store = _rendezvous(launch, seconds)
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    atexit.register(_close_group)
    return store


def _close_group() -> None:
    """Destroy the group before the interpreter exits: a group's thread that still holds a tensor would abort the process (SIGABRT)."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # a group may be held by a reference cycle


def _rendezvous(launch: LaunchEnvironment, seconds: float) -> Any:
    """Return the store after every rank has joined it."""
    if launch.world_size == 1:
        return HashStore()
    address = launch.master_address or "127.0.0.1"
    try:
        if address.startswith("file://"):
            store: Any = FileStore(address.removeprefix("file://"), launch.world_size)
        else:
            store = TCPStore(
                address,
                launch.master_port,
                launch.world_size,
                # torchrun's agent listens on the port already
                is_master=launch.rank == 0 and launch.launcher != "torchrun",
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        store = PrefixStore("hpc_c2g", store)
        store.set(f"rank/{launch.rank}", socket.gethostname())
    except RuntimeError as error:
        raise UserError(
            f"rank {launch.rank} cannot reach rank 0 at {address}:{launch.master_port} within {seconds:.0f} s",
            "check that all ranks started and that the nodes reach each other",
        ) from error
    absent = _absent(store, "rank", launch.world_size, seconds)
    if absent:
        raise UserError(
            f"rank {', '.join(map(str, absent))} of {launch.world_size} did not join within {seconds:.0f} s",
            "check their logs and nodes; the other ranks stopped before any work",
        )
    return store
