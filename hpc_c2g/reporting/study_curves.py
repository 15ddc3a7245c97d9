"""Curves of all runs of a study and their means over seeds; a run is read when its curves are first needed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hpc_c2g.files import write_atomically
from hpc_c2g.monitoring.layout import AVERAGED
from hpc_c2g.reporting.averages import Average, Curves, average
from hpc_c2g.reporting.run_curves import FILE, Stamp, read_runs, stamp_of

WANTED = re.compile(rf"{'|'.join(map(re.escape, AVERAGED))}|(alarm|signature)/.+")
"""Scalars that a study uses."""


class StudyCurves:
    """The curves of a study's runs.

    Args:
        folders: Folder of each run that has begun, by its id.
        groups: Ids of the runs that only their seed sets apart, by the group's label.
        notes: File that keeps what was left out of each run, so that a run which did not change need not be read to report it.
    """

    def __init__(self, folders: Mapping[str, Path], groups: Mapping[str, Sequence[str]], notes: Path) -> None:
        self.folders, self.groups, self.notes = folders, groups, notes
        self.stamps = {key: stamp_of(folder / FILE) for key, folder in folders.items()}
        self._known = _load_notes(notes)
        self._curves: dict[str, Curves] = {}
        self._averages: dict[str, dict[str, Average]] = {}

    def stamps_of(self, label: str) -> dict[str, Stamp]:
        """Stamps of a group's files, by which a change is noticed."""
        return {key: self.stamps[key] for key in self.groups[label]}

    def read(self, keys: Iterable[str]) -> Mapping[str, Curves]:
        """The curves of these runs, with those of the scalars that a study uses."""
        keys = list(keys)
        missing = {key: self.folders[key] for key in keys if key not in self._curves}
        for key, reading in read_runs(missing, WANTED, len(os.sched_getaffinity(0))):
            self._curves[key], self._known[key] = reading.curves, (self.stamps[key], reading.skipped)
        return {key: self._curves[key] for key in keys}

    def averages(self, labels: Iterable[str]) -> Mapping[str, Mapping[str, Average]]:
        """Mean and interval of each averaged scalar over the runs of these groups, by the group's label."""
        labels = list(labels)
        missing = [label for label in labels if label not in self._averages]
        self.read([key for label in missing for key in self.groups[label]])
        for label in missing:
            found = average([self._curves[key] for key in self.groups[label]], AVERAGED)
            self._averages[label] = found
        return {label: self._averages[label] for label in labels}

    def skipped(self) -> dict[str, tuple[str, ...]]:
        """Notes on what was left out of the runs' files and why, by run.

        Raises:
            UserError: The notes cannot be written.
        """
        self.read(key for key, stamp in self.stamps.items() if self._known.get(key, (None,))[0] != stamp)
        known = {key: self._known[key] for key in self.folders}
        if known != _load_notes(self.notes):
            write_atomically(self.notes, json.dumps(known).encode())
        return {key: lines for key, (_, lines) in known.items() if lines}


def _load_notes(file: Path) -> dict[str, tuple[Stamp, tuple[str, ...]]]:
    try:
        content = json.loads(file.read_bytes())
        return {key: (tuple(stamp), tuple(lines)) for key, (stamp, lines) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
