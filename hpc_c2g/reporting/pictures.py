"""PNG pictures of a study's figures, which several processes draw."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context

from hpc_c2g.monitoring.layout import LEARNING_CURVES
from hpc_c2g.reporting.averages import Average
from hpc_c2g.reporting.drawing import Figure
from hpc_c2g.reporting.figures import figures
from hpc_c2g.reporting.laws import Row
from hpc_c2g.reporting.page import Picture

FEW = 4
"""Number of figures that are drawn faster by one process than by several that must be started first."""


@dataclass(frozen=True)
class FigureSource:
    """Numbers that a study's figures show.

    Attributes:
        groups: Means of each group of runs that only their seed sets apart.
        sampling: Means of the sampling errors.
        averages: Mean curves by the group's label and the scalar's name.
        prediction: Predicted samples per second by number of nodes, if the study has a plan.
    """

    groups: Sequence[Row]
    sampling: Sequence[Row]
    averages: Mapping[str, Mapping[str, Average]]
    prediction: Mapping[int, float] | None

    def figures(self) -> list[Figure]:
        """Return the figures, none of them drawn yet."""
        return figures(self.groups, self.sampling, self.averages, self.prediction)


def pictures(source: FigureSource) -> list[Picture]:
    """Draw all figures, in as many processes as there are cores if there are many."""
    drawn = {label: {tag: one[tag] for tag in LEARNING_CURVES if tag in one} for label, one in source.averages.items()}
    source = FigureSource(source.groups, source.sampling, drawn, source.prediction)
    found = source.figures()
    pngs = _pngs(source, found, len(os.sched_getaffinity(0)))
    return [Picture(one.name, one.alt, png) for one, png in zip(found, pngs, strict=True)]


def _pngs(source: FigureSource, found: Sequence[Figure], processes: int) -> list[bytes]:
    """Draw the first figures here, and their equal shares in other processes at the same time."""
    if len(found) <= FEW or processes < 2:
        return [one.png for one in found]
    own = len(found) // processes
    try:
        with ProcessPoolExecutor(processes - 1, get_context("spawn")) as pool:
            others = pool.map(_png, repeat(source), range(own, len(found)))
            return [*[one.png for one in found[:own]], *others]
    except BrokenProcessPool:  # a process was killed: all are drawn here
        return [one.png for one in found]


def _png(source: FigureSource, number: int) -> bytes:
    return source.figures()[number].png
