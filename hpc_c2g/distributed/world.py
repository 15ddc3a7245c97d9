"""The processes that train together: how they meet, what one does for all, and how a lost one is named."""

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
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, TCPStore  # re-exported untyped elsewhere

from hpc_c2g.distributed.environment import LaunchEnvironment, detect, pick_device, prepare_libraries
from hpc_c2g.errors import UserError

T = TypeVar("T")
MEETING_SECONDS = 120.0
COLLECTIVE_SECONDS = 1800.0
ROLL_CALL_SECONDS = 5.0


@dataclass(frozen=True)
class World:
    """One process's view of all of them.

    Attributes:
        launch: who this process is.
        device: where it computes.
        store: the key-value store through which they met.
    """

    launch: LaunchEnvironment
    device: torch.device
    store: Any

    @classmethod
    def start(
        cls, device: str, deterministic: bool, launch: LaunchEnvironment | None = None, seconds: float = MEETING_SECONDS
    ) -> World:
        """Meet the other processes (gloo on CPU, nccl on GPU).

        Raises:
            UserError: the launch environment is broken, or ranks are missing after ``seconds`` (they are named).
        """
        launch = launch or detect()
        place = pick_device(device, launch.local_rank)
        prepare_libraries(place, deterministic)
        return cls(launch, place, _open_group(launch, "nccl" if place.type == "cuda" else "gloo", seconds))

    @classmethod
    def single_process(cls, device: torch.device) -> World:
        """A world of one process, whatever else it belongs to."""
        return cls(LaunchEnvironment(), device, HashStore())

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.launch.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.launch.world_size

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes files and speaks for all."""
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
        """Every rank's ``[n, P]``, stacked in the order of ranks: ``[world_size n, P]``."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self.with_rank_check(lambda: dist.all_gather(parts, tensor))
        return torch.cat(parts)

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, plain data or tensors on the CPU, in the order of ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            self.with_rank_check(lambda: dist.all_gather_object(values, value))
        return values

    def gather_to_rank0(self, value: T) -> list[T]:
        """Every rank's value on rank 0, in the order of ranks; nothing on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_rank0 else None
        self.with_rank_check(lambda: dist.gather_object(value, values))
        return values or []

    def any_rank(self, flag: str | None) -> str | None:
        """A flag that some rank has raised (the lowest such rank's), on every rank; None where none has."""
        if self.size == 1:
            return flag
        raised = torch.tensor([1.0 if flag else 0.0], device=self.device)
        self.with_rank_check(lambda: dist.all_reduce(raised))
        if not bool(raised):
            return None
        return next((f for f in self.all_gather_object(flag) if f), None)

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What rank 0's ``make`` returns, on every rank; its UserError is raised on every rank.

        The value must be plain data where there are several ranks.
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
                message[0] = ("error", f"rank 0 failed: {error!r}", "look at its log")
                dist.broadcast_object_list(message, 0)
                raise
        self.with_rank_check(lambda: dist.broadcast_object_list(message, 0))
        if message[0][0] == "error":
            raise UserError(*message[0][1:])
        value: T = message[0][1]
        return value

    def raise_on_all_ranks(self, make: Callable[[], T]) -> T:
        """What this rank's ``make`` returns; a UserError of any rank (the lowest's) is raised on every rank.

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
        """Run a collective; where it breaks, call the roll and name who does not answer."""
        try:
            collective()
        except RuntimeError as error:
            missing = self._roll_call()
            if not missing:
                raise
            raise UserError(
                f"rank {', '.join(map(str, missing))} of {self.size} is gone ({str(error).splitlines()[0]})",
                "look at that rank's log; the same command goes on from the last checkpoint",
            ) from error

    def _roll_call(self) -> list[int]:
        """Ranks that do not answer within ``ROLL_CALL_SECONDS``; rank 0 may keep the store, and take it along."""
        try:
            self.store.set(f"here/{self.rank}", "1")
            return _absent(self.store, "here", self.size, ROLL_CALL_SECONDS)
        except RuntimeError:
            return [0]


def _absent(store: Any, key: str, world_size: int, seconds: float) -> list[int]:
    """Ranks whose ``key/rank`` is not in the store after ``seconds``; returns as soon as all are there."""
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
    """The process group, made once per process: DeepSpeed keeps handles to it. Returns the store through which its ranks met."""
    store = _meet(launch, seconds)
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
    """Before the interpreter ends: a thread of a group that outlives it may still hold a tensor, and then ends the process by SIGABRT."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # who holds a group may be part of a cycle


def _meet(launch: LaunchEnvironment, seconds: float) -> Any:
    """The store, once every rank has signed in."""
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
            f"rank {', '.join(map(str, absent))} of {launch.world_size} did not come within {seconds:.0f} s",
            "look at their logs and nodes; the others stopped without doing anything",
        )
    return store
