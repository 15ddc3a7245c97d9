"""The parts of an event file: framed and checksummed records, and the scalars that they hold."""

from __future__ import annotations

import struct
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, BinaryIO

from google_crc32c import value as crc32c

HEAD, FOOT = struct.Struct("<QI"), struct.Struct("<I")


class Points:
    """Values of one file in the order of writing, each with its tag's number; steps, each for a number of values."""

    def __init__(self, name: str, ids: defaultdict[str, int]) -> None:
        self.name, self.ids, self.skipped = name, ids, Counter[str]()
        self.steps, self.lengths, self.tags, self.values = array("q"), array("q"), array("q"), array("d")
        self.purges: list[tuple[int, int | None]] = []  # (values written before, step)

    def add(self, step: int, summary: Any) -> None:
        """All scalars of one event."""
        ids, tags, values, start = self.ids, self.tags, self.values, len(self.values)
        for value in summary:
            number = value.simple_value
            if not number and not value.HasField("simple_value") and (number := _scalar(value.tensor)) is None:
                continue
            tags.append(ids[value.tag or value.node_name])
            values.append(number)
        self.steps.append(step)
        self.lengths.append(len(values) - start)


def _scalar(tensor: Any) -> float | None:
    """A float or double tensor of rank 0; None for any other."""
    if tensor.dtype not in (1, 2) or tensor.tensor_shape.dim or tensor.tensor_shape.unknown_rank:
        return None
    form, values = ("<f", tensor.float_val) if tensor.dtype == 1 else ("<d", tensor.double_val)
    if len(tensor.tensor_content) == struct.calcsize(form):
        return float(struct.unpack(form, tensor.tensor_content)[0])
    return float(values[0]) if len(values) == 1 and not tensor.tensor_content else None


def records_of(file: BinaryIO, at: int, size: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset behind it, data) of the whole records between two offsets; the data is None where a checksum is wrong."""
    file.seek(at)
    while at + HEAD.size <= size and len(head := file.read(HEAD.size)) == HEAD.size:
        length, seal = HEAD.unpack(head)
        intact = seal == masked(head[:8])
        at += HEAD.size + length + FOOT.size
        if intact and at > size:
            return
        data = file.read(length) if intact else b""
        if not intact or file.read(FOOT.size) != FOOT.pack(masked(data)):
            yield at, None
            return
        yield at, data


def masked(data: bytes) -> int:
    """The checksum of an event file's framing."""
    crc: int = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
