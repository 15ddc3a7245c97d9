"""Readings of many runs, kept on disk between collects: what has not changed is neither read nor loaded again."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically
from hpc_c2g.reporting.curves import Curves
from hpc_c2g.reporting.events import FileState, Reading, Stamp, complaints, event_files, read_events, stamp_of

FORMAT = 1  # raise it also when events are read differently: what was written before is then read afresh
KEY = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")
ALONE = 20  # so many runs are read sooner than processes have started


@dataclass(frozen=True)
class Entry:
    """Of the index: the stamp of a run's archived file, and how far its event files were read."""

    archived: Stamp
    files: dict[str, FileState]


@dataclass(frozen=True)
class Gathered:
    """Keys whose event files differ from what the index knew; of every key, what was skipped and why."""

    changed: tuple[str, ...]
    complaints: dict[str, tuple[str, ...]]


class Archive:
    """A folder of a file per run, ``KEY.npz``, and ``index.json``; what is damaged or of another format counts as absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The file of a run.

        Raises:
            UserError: the key is no safe name.
        """
        if not KEY.fullmatch(key):
            raise UserError(f"{key!r} cannot name an archived run", "letters, digits, '.', '_' and '-', at most 100")
        return self.folder / f"{key}.npz"

    def load(self, key: str) -> Reading | None:
        """A run's last reading, or None."""
        path = self.path(key)
        try:
            with np.load(path, allow_pickle=False) as content:
                about = json.loads(content["about"].tobytes())
                curves = Curves(content["steps"], tuple(about["tags"]), content["values"])
            fits = about["format"] == FORMAT and curves.values.shape == (len(curves.steps), len(curves.tags))
            return Reading(curves, _states(about["files"])) if fits else None
        except Exception:  # a damaged file may fail in any way
            return None

    def save(self, key: str, reading: Reading) -> None:
        """Keep a run's reading; raises UserError where it cannot be written."""
        self.enter({key: self.write(key, reading)})

    def write(self, key: str, reading: Reading) -> Entry:
        """Write a run's file alone; its entry is for ``enter``."""
        about = {"format": FORMAT, "tags": reading.curves.tags, "files": _plain(reading.files)}
        text, buffer = np.frombuffer(json.dumps(about).encode(), np.uint8), io.BytesIO()
        np.savez(buffer, about=text, steps=reading.curves.steps, values=reading.curves.values)
        write_atomically(self.path(key), buffer.getvalue())
        return Entry(stamp_of(self.path(key)), dict(reading.files))

    def enter(self, entries: Mapping[str, Entry | None]) -> None:
        """Make entries of the index or, with None, remove them, and write it."""
        kept = {key: entry for key, entry in {**self.index, **entries}.items() if entry}
        runs = {key: {"archived": entry.archived, "files": _plain(entry.files)} for key, entry in kept.items()}
        write_atomically(self.folder / "index.json", json.dumps({"format": FORMAT, "runs": runs}).encode())
        self.index = kept

    def stale(self, key: str, folder: Path) -> bool:
        """Whether an event file of ``folder`` or the archived file is not as it was; known by a stat of each, no more."""
        found, archived, entry = event_files(folder), stamp_of(self.path(key)), self.index.get(key)
        if entry is None:
            return bool(found) or self.path(key).exists()
        return archived != entry.archived or found != {name: state.stamp for name, state in entry.files.items()}

    def complaints(self, key: str) -> tuple[str, ...]:
        """What was skipped of a run's event files and why."""
        return complaints(self.index[key].files) if key in self.index else ("has no event files",)

    @cached_property
    def index(self) -> dict[str, Entry]:
        """How far every run was read."""
        try:
            content = json.loads((self.folder / "index.json").read_bytes())
            runs = content["runs"] if content["format"] == FORMAT else {}
            return {key: Entry(tuple(run["archived"]), _states(run["files"])) for key, run in runs.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}


def _plain(files: Mapping[str, FileState]) -> dict[str, Any]:
    return {name: asdict(state) for name, state in files.items()}


def _states(plain: Mapping[str, Any]) -> dict[str, FileState]:
    return {name: FileState(**{**state, "stamp": tuple(state["stamp"])}) for name, state in plain.items()}


def gather(archive: Archive, folders: Mapping[str, Path], processes: int) -> Gathered:
    """Bring an archive up to date with the event files of many runs; no two runs' curves are held by one process.

    Args:
        archive: where the readings are afterwards, for ``load``.
        folders: each key's TensorBoard folder; a key whose folder has no event files is removed.
        processes: to read with, where many runs have changed.

    Raises:
        UserError: the archive cannot be written, or a key is no safe name.
    """
    stale = {key: folder for key, folder in folders.items() if archive.stale(key, folder)}
    known, found = archive.index, dict(_bring_all(archive, stale, processes))
    if found:
        archive.enter(found)
    # not what was read just now: a gathering that was cut short may have archived it, but told nobody
    changed = tuple(k for k in found if _files_of(known.get(k)) != _files_of(archive.index.get(k)))
    return Gathered(changed, {key: archive.complaints(key) for key in folders})


def _files_of(entry: Entry | None) -> dict[str, FileState] | None:
    return entry.files if entry else None


def _bring_all(archive: Archive, left: dict[str, Path], processes: int) -> Iterator[tuple[str, Entry | None]]:
    if len(left) > ALONE and processes > 1:
        keys, alone = list(left), Archive(archive.folder)  # without the index, which need not travel
        with ProcessPoolExecutor(min(processes, len(keys)), get_context("spawn")) as pool:
            try:
                entries = pool.map(_bring, [alone] * len(keys), keys, list(left.values()), chunksize=8)
                for key, entry in zip(keys, entries, strict=True):
                    del left[key]
                    yield key, entry
            except BrokenProcessPool:
                pass  # a process was killed: the rest is read here
    for key, folder in left.items():
        yield key, _bring(archive, key, folder)


def _bring(archive: Archive, key: str, folder: Path) -> Entry | None:
    """The entry of a run, whose archived file is then up to date; none where it has no event files."""
    before = archive.load(key)
    reading = read_events(folder, before)
    if reading is before and reading.files:
        return Entry(stamp_of(archive.path(key)), dict(reading.files))
    if reading.files:
        return archive.write(key, reading)
    archive.path(key).unlink(missing_ok=True)
    return None
