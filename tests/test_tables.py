"""Distances of tables of measurements against loops, and their laws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_c2g.evaluation.tables import correlation_distance, marginal_distance


def rows(count: int, seed: int, columns: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)


def test_marginals_are_the_largest_gap_of_distribution_functions() -> None:
    ours, theirs = rows(13, 0), rows(17, 1)
    gaps = []
    for a, b in zip(ours.T.tolist(), theirs.T.tolist(), strict=True):
        gaps.append(max(abs(sum(x <= t for x in a) / 13 - sum(x <= t for x in b) / 17) for t in [*a, *b]))
    assert marginal_distance(ours, theirs) == pytest.approx(sum(gaps) / 4)


def test_correlations_are_those_of_numpy() -> None:
    ours, theirs = rows(13, 0), rows(17, 1)
    a, b = (np.corrcoef(t.double().numpy().T) for t in (ours, theirs))
    wanted = [abs(a[i, j] - b[i, j]) for i, j in itertools.combinations(range(4), 2)]
    assert correlation_distance(ours, theirs) == pytest.approx(np.mean(wanted))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), count=st.integers(2, 20))
def test_a_table_is_at_no_distance_from_its_copy_in_any_order_and_units(seed: int, count: int) -> None:
    table = rows(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert marginal_distance(table[order], table) == 0
    assert correlation_distance(3 * table[order] + 5, table) == pytest.approx(0, abs=1e-4)


def test_extremes() -> None:
    assert marginal_distance(torch.zeros(3, 2), torch.ones(4, 2)) == 1
    line = torch.arange(5.0)
    same, opposite = torch.stack([line, line], 1), torch.stack([line, -line], 1)
    assert correlation_distance(same, opposite) == pytest.approx(2)


def test_a_column_that_does_not_vary_is_correlated_with_nothing() -> None:
    line = torch.arange(5.0)
    assert correlation_distance(torch.stack([line, torch.ones(5)], 1), torch.stack([line, line], 1)) == pytest.approx(1)


def test_only_rows_have_them() -> None:
    images = torch.rand(3, 1, 4, 4)
    assert marginal_distance(images, images) is None
    assert correlation_distance(images, images) is None
    assert correlation_distance(torch.rand(3, 1), torch.rand(3, 1)) is None
