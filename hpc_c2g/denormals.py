"""Flush denormal numbers to zero while a classifier is fitted or a generator trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def flush_denormals() -> Iterator[None]:
    """Context (and decorator) that flushes denormals in this thread and in threads that it starts; restores the mode afterwards.

    Derivatives of gates far from their edge, and weights e^-margin, are denormal: processors multiply them tens of times slower.
    """
    smallest = torch.full((), torch.finfo(torch.float64).tiny, dtype=torch.float64)
    before = not (smallest / 2).item()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
