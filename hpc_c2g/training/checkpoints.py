"""Checkpoints that are complete or absent: written to a temporary folder, flushed, checksummed, renamed; the last few are kept."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hpc_c2g.errors import UserError
from hpc_c2g.files import cannot_write, sync_folder
from hpc_c2g.training.config.train import CheckpointConfig

logger = logging.getLogger(__name__)
STATE, META = "state.pt", "meta.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        step: Number of the last step before it was written.
        state: Nested dictionaries of tensors and plain numbers.
        path: Folder of the checkpoint.
    """

    step: int
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints of one run; as a context it finishes what it began to write.

    Args:
        folder: Folder of the checkpoints.
        config: Steps between two checkpoints, and number of checkpoints kept.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        # the thread starts with its first job; the interpreter's exit waits for it
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except UserError:
            if kind is None:  # else the first failure is the one to report
                raise

    def due(self, step: int, last: int) -> bool:
        """Return True every ``config.every`` steps and after the last one."""
        return step % self.config.every == 0 or step == last

    def publish(self, step: int, state: dict[str, Any]) -> None:
        """Write ``state`` and return when it is complete; a failure leaves every earlier checkpoint unchanged.

        Raises:
            UserError: The file system failed, in this call or in the write that ``publish_later`` started.
        """
        self.finish()
        self._write(step, state)

    def publish_later(self, step: int, state: dict[str, Any]) -> None:
        """Copy ``state`` and return; a thread writes the copy, which takes as much host memory as the state.

        Waits until the checkpoint before this one is written.

        Raises:
            UserError: The write of the checkpoint before failed; a failure of this one is raised by the next call.
        """
        self.finish()
        self._pending = self._thread.submit(self._write, step, snapshot(state))

    def finish(self) -> None:
        """Wait until the write that ``publish_later`` started is complete.

        Raises:
            UserError: The file system failed.
        """
        if self._pending is not None:
            wait([self._pending])
            done, self._pending = self._pending, None  # raised once
            done.result()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        began = time.perf_counter()
        target = self._target(step)
        temporary = self.folder / f".{target.name}.{os.getpid()}.tmp"
        buffer = io.BytesIO()
        torch.save(state, buffer)
        blob = buffer.getbuffer()
        meta = json.dumps(_description(step, blob)).encode()
        try:
            self._remove_leftovers()
            temporary.mkdir(parents=True)
            for name, content in ((STATE, blob), (META, meta)):
                with open(temporary / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            if target.exists():  # mostly a damaged one that was skipped; it stays until the new one is in place
                os.replace(target, _old_copy(target))
            os.replace(temporary, target)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise cannot_write(target, error) from error
        seconds = time.perf_counter() - began
        logger.info("checkpoint written: %s, %d bytes in %.2f s", target, len(blob), seconds, extra={"step": step})
        self._remove(_old_copy(target))
        # a later one was skipped as damaged: if it counted, the one just written would be removed
        for old in [published for published in self.steps() if published <= step][: -self.config.keep]:
            self._remove(self._target(old))

    def _remove_leftovers(self) -> None:
        """Remove the temporary folders of a process that was killed while it wrote."""
        for stale in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        for aside in self.folder.glob("step_*.old"):
            if aside.with_suffix("").exists():
                self._remove(aside)
            else:
                os.replace(aside, aside.with_suffix(""))

    def _remove(self, path: Path) -> None:
        """Rename a checkpoint before its files are deleted, so that a named one is whole even if the process is killed in between."""
        temporary = self.folder / f".{path.name}.{os.getpid()}.tmp"
        with contextlib.suppress(OSError):
            os.replace(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)

    def steps(self) -> list[int]:
        """Return the steps of the published checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d+)(?:\.old)?", p.name, re.ASCII) for p in self.folder.iterdir())
        return sorted({int(name[1]) for name in names if name})

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole; a damaged one is skipped with a warning.

        Raises:
            UserError: There are checkpoints, and all of them are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.at(step)
            except Exception as error:  # a damaged file can raise any exception
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning("checkpoint %s is damaged (%s); trying the one before", self._path(step), reason)
        if steps:
            raise UserError(f"every checkpoint in {self.folder} is damaged", "train again in another run_dir")
        return None

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of ``step``; raises any exception if it is damaged."""
        return Checkpoint(step, _read(self._path(step), step), self._path(step))

    def _path(self, step: int) -> Path:
        """Return the folder of a checkpoint: the one moved aside if a process was killed before the new one was in place."""
        target = self._target(step)
        return _old_copy(target) if not target.exists() and _old_copy(target).exists() else target

    def _target(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"


def _old_copy(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy on the CPU that shares nothing with ``state``; tensors that share memory share it in the copy and in the file too."""
    storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}
    memo: dict[int, Any] = {}
    for tensor in tree_leaves(state):
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            key = (storage.device, storage.data_ptr())
            if key not in storages:
                whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                storages[key] = whole.to("cpu", copy=True).untyped_storage()
            layout = (tensor.storage_offset(), tensor.size(), tensor.stride())
            memo[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(storages[key], *layout)
    return copy.deepcopy(state, memo)  # everything but tensors, with its attributes


def _read(path: Path, step: int) -> dict[str, Any]:
    meta = json.loads((path / META).read_text())
    blob = (path / STATE).read_bytes()
    if meta != _description(step, blob):
        raise ValueError(f"checksum mismatch, {len(blob)} of {meta['bytes']} bytes")
    state: dict[str, Any] = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    return state


def _description(step: int, blob: bytes | memoryview) -> dict[str, Any]:
    return {"step": step, "sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
