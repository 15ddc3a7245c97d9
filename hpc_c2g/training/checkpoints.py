"""Checkpoints that are complete or absent: written beside, flushed, checksummed, renamed; the last few are kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc_c2g.errors import C2GError
from hpc_c2g.files import cannot_write, sync_folder
from hpc_c2g.training.config import CheckpointConfig

STATE, META = "state.pt", "meta.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        step: after which it was written.
        state: nested dictionaries of tensors and plain numbers.
        path: its folder.
    """

    step: int
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints of one run, in ``folder``."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config

    def due(self, step: int, last: int) -> bool:
        """Every so many steps and after the last one."""
        return step % self.config.every == 0 or step == last

    def publish(self, step: int, state: dict[str, Any]) -> None:
        """Write ``state``; a failure leaves every earlier checkpoint as it was.

        Raises:
            C2GError: the file system refused.
        """
        target = self.folder / f"step_{step:08d}"
        temporary = self.folder / f".{target.name}.{os.getpid()}.tmp"
        buffer = io.BytesIO()
        torch.save(state, buffer)
        blob = buffer.getvalue()
        meta = {"step": step, "sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
        try:
            for stale in self.folder.glob(".step_*.tmp"):  # of a process that was killed while it wrote
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, content in ((STATE, blob), (META, json.dumps(meta).encode())):
                with open(temporary / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            if target.exists():  # written before an interruption that came between step and log
                shutil.rmtree(target)
            os.replace(temporary, target)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise cannot_write(target, error) from error
        for old in self.steps()[: -self.config.keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(p.name[5:]) for p in self.folder.iterdir() if p.name.startswith("step_") and p.name[5:].isdigit()
        )

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; a damaged one is passed over with a warning.

        Raises:
            C2GError: there are checkpoints, and all of them are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.at(step)
            except Exception as error:  # damage shows in many ways
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(
                    f"checkpoint {self._path(step)} is damaged ({reason}); trying the one before", stacklevel=2
                )
        if steps:
            raise C2GError(f"every checkpoint in {self.folder} is damaged", "train again in another run_dir")
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``; any exception where it is damaged."""
        return Checkpoint(step, _read(self._path(step)), self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"


def _read(path: Path) -> dict[str, Any]:
    meta = json.loads((path / META).read_text())
    blob = (path / STATE).read_bytes()
    if hashlib.sha256(blob).hexdigest() != meta["sha256"]:
        raise ValueError(f"checksum mismatch, {len(blob)} of {meta['bytes']} bytes")
    state: dict[str, Any] = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    return state
