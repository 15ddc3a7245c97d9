"""Event files of TensorBoard that are written at once: without torch, which takes seconds to import, and without a thread per file."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c

from hpc_c2g.monitoring import summaries
from hpc_c2g.monitoring.summaries import Summary

BOARD, SESSION, EVALUATION = "tensorboard", "hparams", "evaluation"
"""Folders of a run: its curves, its hyper-parameters with its final metrics, and its evaluation. The session is separate, because a
study writes its own; the evaluation is separate, because it *uses real data*."""


class EventFile:
    """Context that writes one event file.

    Args:
        folder: Folder of the file; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        folder.mkdir(parents=True, exist_ok=True)
        self._event, now = Event, time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = open(folder / name, "wb")  # noqa: SIM115 -- closed by __exit__
        self._write(Event(wall_time=now, file_version="brain.Event:2"))

    def __enter__(self) -> EventFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, summary: Summary, step: int = 0) -> None:
        """Write one event.

        Args:
            summary: Values of the event.
            step: Step of all its values.
        """
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def add_curves(self, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        """Write curves that have a value at each of the steps, an event per step.

        Args:
            steps: Steps in rising order.
            curves: Values by name, one per step each.
        """
        event = self._event(wall_time=time.time(), summary=summaries.scalars(dict.fromkeys(curves, 0.0)))
        slots = list(event.summary.value)
        for step, row in zip(steps, zip(*curves.values(), strict=True), strict=True):
            event.step = step
            for slot, value in zip(slots, row, strict=True):  # a fraction of the time of a new message
                slot.simple_value = value
            self._write(event)

    def _write(self, event: Any) -> None:
        """Write a record: its length, the length's checksum, the event, the event's checksum."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(b"".join((length, _masked_checksum(length), data, _masked_checksum(data))))


def _masked_checksum(data: bytes) -> bytes:
    """Return the CRC-32C as records of TensorBoard store it: rotated right by 15 bits, plus a constant."""
    value = google_crc32c.value(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)
