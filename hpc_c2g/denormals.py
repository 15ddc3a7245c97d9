"""Numbers below the smallest normal one count as zero while a net is fitted or a generator trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def flush_denormals() -> Iterator[None]:
    """Flush within, for this thread and those that it starts meanwhile; as before afterwards. A decorator too.

    Derivatives of gates far from their edge, and weights e^-margin, are such numbers: processors multiply them tens of times slower.
    """
    smallest = torch.full((), torch.finfo(torch.float64).tiny, dtype=torch.float64)
    before = not (smallest / 2).item()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
