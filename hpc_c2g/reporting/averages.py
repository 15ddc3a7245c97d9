"""Curves of runs, and their mean with a confidence band over runs that differ in their seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curves:
    """All scalars of one run.

    Attributes:
        steps: in rising order, each once, ``[n]`` int64.
        tags: names of the scalars, ``T`` of them.
        values: ``[n, T]`` float64, NaN where a scalar was not written at a step.
    """

    steps: Array
    tags: tuple[str, ...]
    values: Array

    def points(self, tag: str) -> tuple[Array, Array]:
        """Steps and values of one scalar, where it was written; empty where it never was."""
        if tag not in self.tags:
            return self.steps[:0], np.empty(0)
        column = self.values[:, self.tags.index(tag)]
        there = ~np.isnan(column)
        return self.steps[there], column[there]


@dataclass(frozen=True)
class Average:
    """One scalar over several runs.

    Attributes:
        steps: ``[n]``.
        mean: over the runs that have a value there, ``[n]``.
        low: mean - t s / sqrt(k), the lower end of Student's 95 % confidence interval for k runs; the mean where k = 1.
        high: the upper end.
        runs: k, ``[n]``.
    """

    steps: Array
    mean: Array
    low: Array
    high: Array
    runs: Array


def average(curves: Sequence[Curves]) -> dict[str, Average]:
    """Every scalar's average, at the steps that at least half of the runs that have it wrote it at."""
    found = {}
    for tag in dict.fromkeys(tag for one in curves for tag in one.tags):
        parts = [one.points(tag) for one in curves if tag in one.tags]
        steps = np.unique(np.concatenate([s for s, _ in parts]))
        table = np.full((len(parts), len(steps)), np.nan)
        for row, (at, values) in zip(table, parts, strict=True):
            row[np.searchsorted(steps, at)] = values
        runs = (~np.isnan(table)).sum(0)
        kept = 2 * runs >= len(parts)
        table, runs, steps = table[:, kept], runs[kept], steps[kept]
        if len(steps):
            mean, half = interval(table)
            found[tag] = Average(steps, mean, mean - half, mean + half, runs)
    return found


def interval(table: Array) -> tuple[Array, Array]:
    """Mean and half width of Student's confidence interval over the rows of ``table`` ``[k, n]``; NaN counts as absent, no column is."""
    from scipy.stats import t as student  # takes a second

    runs = (~np.isnan(table)).sum(0)
    mean = np.nansum(table, 0) / runs
    deviation = np.sqrt(np.nansum((table - mean) ** 2, 0) / np.maximum(runs - 1, 1))
    factor = np.where(runs > 1, student.ppf(0.5 + CONFIDENCE / 2, np.maximum(runs - 1, 1)), 0.0)
    return mean, factor * deviation / np.sqrt(runs)
