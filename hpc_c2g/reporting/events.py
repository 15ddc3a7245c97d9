"""Scalars of a run's TensorBoard folder: only bytes that are new are read, and damage costs no more than it must."""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hpc_c2g.reporting.curves import Curves
from hpc_c2g.reporting.records import FOOT, Points, masked, records_of

PREFIX, VERSION, BLOCK = "events.out.tfevents.", "brain.Event:2", 4 << 20
Stamp = tuple[int, int, int]
UNREADABLE: Stamp = (-1, 0, 0)


@dataclass(frozen=True)
class FileState:
    """What is known of one event file.

    Attributes:
        stamp: size, time of change and inode at reading, which stopped at that size; UNREADABLE is tried again.
        offset: of the first byte not read: the end, a record that is not whole yet, or the fault.
        seal: checksum of the last record read, by which a file that was rewritten is told from one that has grown.
        records: how many were read.
        skipped: how often what was left out or replaced.
        fault: why reading stopped at ``offset``, or "".
    """

    stamp: Stamp
    offset: int = 0
    seal: int = 0
    records: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True, eq=False)
class Reading:
    """The scalars of a folder (finite values, tags in the order of their names), and how far its files were read."""

    curves: Curves
    files: Mapping[str, FileState]

    @property
    def complaints(self) -> tuple[str, ...]:
        """What was skipped and why."""
        return complaints(self.files)

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Files that end in a part of a record: usual while a run writes, and after a kill."""
        parts = [(name, s.offset) for name, s in self.files.items() if s.offset < s.stamp[0] and not s.fault]
        return tuple(f"{name}: the record at byte {offset} is not whole yet" for name, offset in parts)


def complaints(files: Mapping[str, FileState]) -> tuple[str, ...]:
    """What was skipped of files and why, a line each."""
    lines = []
    for name, state in files.items():
        lines += [f"{name}: {count} {what}" for what, count in sorted(state.skipped.items())]
        lines += [f"{name}: {state.fault}"] if state.fault else []
    return tuple(lines)


def event_files(folder: Path) -> dict[str, Stamp]:
    """Stamps of a folder's event files in the order of their names; none where the folder cannot be listed."""
    try:
        return {name: stamp_of(folder / name) for name in sorted(os.listdir(folder)) if name.startswith(PREFIX)}
    except OSError:
        return {}


def stamp_of(path: Path) -> Stamp:
    """Size, time of change and inode of a file; UNREADABLE where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return UNREADABLE
    return (found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else UNREADABLE


def read_events(folder: Path, before: Reading | None = None) -> Reading:
    """Read the scalars of a run as TensorBoard shows them; damage raises nothing but is told in ``complaints``.

    A session's start at step s removes what earlier events wrote at s and later; of values written twice the last counts.

    Args:
        folder: of the event files, which are read in the order of their names.
        before: an earlier reading of the folder, of which only what is new is read. The result is that of reading
            everything; it is ``before`` itself where nothing has changed, found out by a stat per file.
    """
    found, nothing = event_files(folder), Reading(Curves(np.empty(0, np.int64), (), np.empty((0, 0))), {})
    if before is None:
        return _read(folder, found, nothing)
    if found == {name: state.stamp for name, state in before.files.items()}:
        return before
    reading = _read(folder, found, before if _only_grown(folder, found, before.files) else nothing)
    return before if reading.files == before.files else reading


def _only_grown(folder: Path, found: Mapping[str, Stamp], known: Mapping[str, FileState]) -> bool:
    """Whether nothing happened but growth of the last known file, and new files behind it."""
    names = list(known)
    if list(found)[: len(names)] != names or any(known[name].stamp != found[name] for name in names[:-1]):
        return False
    if not names or found[names[-1]] == known[names[-1]].stamp:
        return True
    (size, _, inode), last = found[names[-1]], known[names[-1]]
    if last.stamp[2] != inode or last.stamp[0] >= size:
        return False
    try:
        with open(folder / names[-1], "rb") as file:
            file.seek(max(last.offset - FOOT.size, 0))
            return not last.records or file.read(FOOT.size) == FOOT.pack(last.seal)
    except OSError:
        return False


def _read(folder: Path, found: Mapping[str, Stamp], before: Reading) -> Reading:
    states, parts = dict(before.files), []
    ids: defaultdict[str, int] = defaultdict(None, {tag: k for k, tag in enumerate(before.curves.tags)})
    ids.default_factory = ids.__len__
    for name, stamp in found.items():
        if name not in states or states[name].stamp != stamp:
            parts.append(Points(name, ids))
            states[name] = _scan(folder / name, stamp, states.get(name, FileState(UNREADABLE)), parts[-1])
    curves = _merge(before.curves, ids, parts)
    for part in parts:
        s = states[part.name]
        skipped = dict(Counter(s.skipped) + part.skipped)
        states[part.name] = FileState(s.stamp, s.offset, s.seal, s.records, skipped, s.fault)
    return Reading(curves, states)


def _scan(path: Path, stamp: Stamp, state: FileState, points: Points) -> FileState:
    """Read a file on from ``state``; what is skipped is counted with the points."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto import event_pb2

    at, seal, records, fault = state.offset, state.seal, state.records, "" if stamp[0] else "is empty"
    last, skipped = b"", points.skipped
    parse = event_pb2.Event.FromString  # a new message each time: one that is reused never gives memory back
    try:
        if stamp == UNREADABLE:
            raise OSError(0, "no such file")
        with open(path, "rb", buffering=BLOCK) as file:
            for end, data in records_of(file, at, stamp[0]):
                if data is None:
                    fault = f"record {records + 1} at byte {at} has a wrong checksum; the rest of the file is left out"
                    break
                at, last, records = end, data, records + 1
                try:
                    event = parse(data)
                except DecodeError:
                    skipped["records are no events; they are left out"] += 1
                    continue
                what = event.WhichOneof("what")
                if what == "summary":
                    points.add(event.step, event.summary.value)
                elif what == "session_log" and event.session_log.status == event_pb2.SessionLog.START:
                    points.purges.append((len(points.values), event.step))
                if (what == "file_version" or records == 1) and event.file_version != VERSION:
                    skipped[f"statements of file version {event.file_version[:30]!r} are read as {VERSION}"] += 1
    except OSError as error:
        stamp, fault = UNREADABLE, f"cannot be read from byte {at} on: {error.strerror}; the rest is left out"
    return FileState(stamp, at, masked(last) if records > state.records else seal, records, state.skipped, fault)


def _merge(curves: Curves, ids: Mapping[str, int], parts: Sequence[Points]) -> Curves:
    """Curves with the points that were written after them; what is skipped is counted with the points."""
    steps = np.unique(np.concatenate([curves.steps, *(np.asarray(part.steps) for part in parts)]))
    table = np.full((len(steps), len(ids)), np.nan)
    table[np.searchsorted(steps, curves.steps), : len(curves.tags)] = curves.values
    for part in parts:
        rows = np.repeat(np.searchsorted(steps, part.steps), part.lengths)
        columns, values, begin = np.asarray(part.tags), np.asarray(part.values), 0
        for end, step in [*part.purges, (len(values), None)]:
            kept = np.flatnonzero(np.isfinite(values[begin:end])) + begin
            part.skipped["values are not finite; they are left out"] += end - begin - len(kept)
            if len(kept):
                window = table[rows[kept].min() : rows[kept].max() + 1]
                gaps = np.count_nonzero(np.isnan(window))
                table[rows[kept], columns[kept]] = values[kept]
                filled = int(gaps - np.count_nonzero(np.isnan(window)))
                part.skipped["values are written again at the same step; the last of each counts"] += len(kept) - filled
            if step is not None:
                table[np.searchsorted(steps, step) :] = np.nan
            begin = end
    there = ~np.isnan(table)
    used = there.any(1)
    order = sorted((tag, k) for tag, k in ids.items() if there[:, k].any())
    return Curves(steps[used], tuple(tag for tag, _ in order), table[used][:, [k for _, k in order]])
