"""Run directory: locked by one process at a time, bound to one configuration."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf

from hpc_c2g.errors import UserError
from hpc_c2g.files import cannot_write, write_atomically
from hpc_c2g.generators.config import GENERATORS, MLPGeneratorConfig
from hpc_c2g.lease import live_holder
from hpc_c2g.settings import read_plain
from hpc_c2g.training.config.train import TrainConfig

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# settings that may differ when a run is resumed: they do not change the result
FREE_TO_CHANGE = (
    "run_dir",
    "classifier",
    "device",
    "micro_batch",
    "zero_stage",
    "distributed.groups",
    "distributed.hierarchical",
    "log",
    "profiler",
    "checkpoint",
)
EASING = "lower_lr"
"""Alarm policy under which the result depends on the steps that are logged."""


class RunDirectory:
    """Context that locks ``config.run_dir``; the kernel releases the lock when the process ends in any way.

    Raises:
        UserError: Another process has the lock, the directory belongs to another configuration, or it cannot be written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.run_dir)
        self.config = config

    def __enter__(self) -> RunDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if holder := self._acquire_lock():
            self._lock.close()
            raise UserError(f"run_dir={self.path} is in use by {holder}", "wait for it, or choose another run_dir")
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        try:
            self._bind()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _acquire_lock(self) -> str | None:
        """Lock the folder, or return its holder: a process with the lock on this host, or a study's lease from any host."""
        leased = live_holder(self.path)
        if leased is not None and not (leased.is_here and leased.pid == os.getpid()):
            return leased.text
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:  # some file systems have no locks; a study's lease needs none
                return None
            self._lock.seek(0)
            return self._lock.read().strip() or "another process"
        return None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.close()

    def _bind(self) -> None:
        """Write ``config.yaml``, or check that the existing one matches; a start that left no checkpoint is overwritten."""
        file = self.path / "config.yaml"
        new = plain(self.config)
        if file.exists() and any(self.path.glob("checkpoints/step_*")):
            # settings that are newer than the run have their defaults
            defaults = TrainConfig(classifier="c", run_dir="r", generator=type(self.config.generator)())
            old = _filled(_values(file), plain(defaults))
            free_names = _free_to_change(old, new)
            differences = [
                f"{name}={old_value} there, {new_value} now"
                for name, old_value, new_value in _differences(old, new)
                if not any(name == free or name.startswith(f"{free}.") for free in free_names)
            ]
            if differences:
                raise UserError(
                    f"run_dir={self.path} holds a run with other settings: {'; '.join(differences[:4])}",
                    "choose another run_dir, or the same settings to resume",
                )
            return
        write_atomically(file, OmegaConf.to_yaml(OmegaConf.create(new)).encode())


def _free_to_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    policies = [values.get("alarms", {}).get("policy") for values in (old, new)]
    if EASING in policies:
        return (*(name for name in FREE_TO_CHANGE if name != "log"), "log.progress", "log.level", "log.all_ranks")
    return (*FREE_TO_CHANGE, "alarms")


def plain(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as yaml-safe values."""
    result: dict[str, Any] = _listed(asdict(config))
    return result


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def read_config(file: Path) -> dict[str, Any]:
    """Read a run's ``config.yaml``.

    Raises:
        UserError: It is missing, no yaml mapping, or has settings that this version does not have.
    """
    values = _values(file)
    generator = values.get("generator")
    kind = GENERATORS.get(generator.get("name", "mlp") if isinstance(generator, dict) else "mlp", MLPGeneratorConfig)
    unknown = _unknown(values, plain(TrainConfig(classifier="c", run_dir="r", generator=kind())))
    if unknown:
        raise UserError(
            f"{file} has settings that this version does not have: {', '.join(unknown[:4])}",
            "train again in another run_dir, or use the version that began the run",
        )
    return values


def _values(file: Path) -> dict[str, Any]:
    """Return a run's ``config.yaml`` unchanged, with the settings of any version."""
    return read_plain(
        file, f"run_dir={file.parent} is no run", "train first: `c2g train`", "train again in another run_dir"
    )


def _unknown(values: Mapping[str, Any], known: Mapping[str, Any], section: str = "") -> list[str]:
    """Return the names of the settings in ``values`` that ``known`` lacks."""
    found = []
    for name, value in values.items():
        if name not in known:
            found.append(f"{section}{name}")
        elif isinstance(value, Mapping) and isinstance(known[name], Mapping) and name != "deepspeed":
            found += _unknown(value, known[name], f"{section}{name}.")
    return found


def _filled(old: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``old`` with its missing settings from ``defaults``."""
    both = {
        k: _filled(v, defaults[k]) for k, v in old.items() if isinstance(v, dict) and isinstance(defaults.get(k), dict)
    }
    return {**defaults, **old, **both}


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{name}.{k}".lstrip("."))]
    return [] if old == new else [(name, old, new)]
