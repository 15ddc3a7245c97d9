"""Curves of runs, and their mean with a confidence band over runs that differ in their seed alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        steps: Steps in rising order, each once, ``[n]`` int64.
        tags: Names of the scalars, ``T`` of them.
        values: Values, ``[n, T]`` float64, NaN where a scalar was not written at a step.
    """

    steps: Array
    tags: tuple[str, ...]
    values: Array

    def points(self, tag: str) -> tuple[Array, Array]:
        """Return the steps and the values of one scalar where it was written; empty if it never was."""
        if tag not in self.tags:
            return self.steps[:0], np.empty(0)
        column = self.values[:, self.tags.index(tag)]
        there = ~np.isnan(column)
        return self.steps[there], column[there]


@dataclass(frozen=True)
class Average:
    """One scalar over several runs.

    Attributes:
        steps: Steps, ``[n]``.
        mean: Mean over the runs that have a value at the step, ``[n]``.
        low: Lower end of Student's 95 % confidence interval for k runs, mean - t s / sqrt(k), ``[n]``; the mean where k = 1.
        high: Upper end of the interval, ``[n]``.
        runs: Number k of runs that have a value at the step, ``[n]``.
    """

    steps: Array
    mean: Array
    low: Array
    high: Array
    runs: Array


def average(curves: Sequence[Curves], tags: Iterable[str] | None = None) -> dict[str, Average]:
    """Average scalars over runs, at the steps at which at least half of the runs that have the scalar wrote it.

    Args:
        curves: Curves of the runs.
        tags: Names of the scalars, in this order; those that no run has are left out. All if None.
    """
    found = {}
    there = dict.fromkeys(tag for one in curves for tag in one.tags)
    for tag in there if tags is None else [tag for tag in tags if tag in there]:
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
    """Return the mean and the half width of Student's confidence interval over the rows, ``[n]`` each.

    mean +- t(k - 1) s / sqrt(k) for the k values of a column, s their sample standard deviation; the width is 0 where k = 1.

    Args:
        table: Values, ``[rows, n]``; NaN counts as absent, and each column has at least one value.
    """
    from scipy.special import (
        stdtrit,
    )  # the quantile of Student's t, as scipy.stats has it, which takes a second to import

    runs = (~np.isnan(table)).sum(0)
    mean = np.nansum(table, 0) / runs
    deviation = np.sqrt(np.nansum((table - mean) ** 2, 0) / np.maximum(runs - 1, 1))
    factor = np.where(runs > 1, stdtrit(np.maximum(runs - 1, 1), 0.5 + CONFIDENCE / 2), 0.0)
    return mean, factor * deviation / np.sqrt(runs)
