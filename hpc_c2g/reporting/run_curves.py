"""Curves of a run, read from its metrics.jsonl: a line per logged step; a resumed run drops the lines after its checkpoint."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from hpc_c2g.reporting.averages import Curves

FILE = "metrics.jsonl"
FEW = 40
"""Number of runs that are read faster by one process than by several that must be started first."""
Stamp = tuple[int, int, int]
_DECODER = json.JSONDecoder(parse_float=str)
"""Decoder that leaves fractions as text: to convert only those of the wanted scalars takes half of the time."""
NO_FILE: Stamp = (-1, 0, 0)


@dataclass(frozen=True, eq=False)
class Reading:
    """Result of reading a run.

    Attributes:
        curves: Finite values of the scalars, tags in the order of their names.
        skipped: Notes on what was left out and why, one line each.
    """

    curves: Curves
    skipped: tuple[str, ...]


def stamp_of(path: Path) -> Stamp:
    """Size, time of change and inode of a file, by which a change is noticed; ``NO_FILE`` if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return NO_FILE
    return (found.st_size, found.st_mtime_ns, found.st_ino)


def read_run(folder: Path, wanted: re.Pattern[str]) -> Reading:
    """Read the scalars of a run; damage raises nothing and is reported in ``skipped``.

    A last line without its end is left out silently: the run is writing it, or was killed. If a step is there twice, its last line counts.

    Args:
        folder: Folder of the run.
        wanted: Pattern of the names of the scalars to read.
    """
    try:
        texts = (folder / FILE).read_bytes().split(b"\n")
    except OSError as error:
        return Reading(_curves({}, wanted), (f"{FILE}: cannot be read: {error.strerror}",))
    lines: dict[int, Mapping[str, Any]] = {}
    damaged, repeated = [], 0
    for number, text in enumerate(texts, 1):
        line = _parse(text)
        if line is None:
            if text and number < len(texts):
                damaged.append(number)
            continue
        step = line["step"]
        repeated += step in lines
        lines[step] = line
    curves = _curves(lines, wanted)
    written = sum(tag in line for tag in _tags(lines, wanted) for line in lines.values())
    infinite = written - int(np.count_nonzero(~np.isnan(curves.values)))
    skipped = [f"{FILE}: line {number} is damaged and left out" for number in damaged[:1]]
    skipped += [f"{FILE}: {len(damaged) - 1} more damaged lines are left out"] if len(damaged) > 1 else []
    skipped += [f"{FILE}: {repeated} steps are written again; the last line of each counts"] if repeated else []
    skipped += [f"{FILE}: {infinite} values are not finite numbers and left out"] if infinite else []
    skipped += [] if lines else [f"{FILE}: has no lines"]
    return Reading(curves, tuple(skipped))


def read_runs(folders: Mapping[str, Path], wanted: re.Pattern[str], processes: int) -> Iterator[tuple[str, Reading]]:
    """Read many runs, in the order given.

    Args:
        folders: Folder of each run, by its id.
        wanted: Pattern of the names of the scalars to read.
        processes: Number of processes that read if there are many runs.
    """
    left, read = dict(folders), functools.partial(read_run, wanted=wanted)
    if len(left) > FEW and processes > 1:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            try:
                for key, reading in zip(folders, pool.map(read, folders.values(), chunksize=8), strict=True):
                    del left[key]
                    yield key, reading
            except BrokenProcessPool:
                pass  # a process was killed: the rest is read here
    for key, folder in left.items():
        yield key, read(folder)


def _parse(text: bytes) -> Mapping[str, Any] | None:
    """Return a line's scalars, fractions as text; None if it is no object with a number of a step."""
    try:
        line = _DECODER.decode(text.decode())
    except ValueError:
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if isinstance(step, int) and 0 <= step < 2**63 else None


def _tags(lines: Mapping[int, Mapping[str, Any]], wanted: re.Pattern[str]) -> list[str]:
    names = {name for line in lines.values() for name in line} - {"step"}
    return sorted(name for name in names if wanted.fullmatch(name))


def _curves(lines: Mapping[int, Mapping[str, Any]], wanted: re.Pattern[str]) -> Curves:
    steps, tags = sorted(lines), _tags(lines, wanted)
    rows = [[_number(lines[step].get(tag)) for tag in tags] for step in steps]
    values = np.array(rows, dtype=float).reshape(len(steps), len(tags))
    values[~np.isfinite(values)] = math.nan
    there = ~np.isnan(values)
    used, known = there.any(1), there.any(0)
    kept = tuple(tag for tag, any_value in zip(tags, known, strict=True) if any_value)
    return Curves(np.array(steps, np.int64)[used], kept, values[used][:, known])


def _number(value: Any) -> float:
    """Convert a number that ``_parse`` left as text; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
