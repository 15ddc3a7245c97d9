"""Laws of the priors: slow loops, micro-batches that add up."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpc_c2g.kkt import priors

quick = settings(deadline=None, max_examples=30)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(st.integers(1, 6), st.integers(0, 1000))
def test_box_excess_is_its_loop(count, seed):
    x, lower, upper = normal(count, 2, 3, seed=seed), -normal(2, 3, seed=1).abs(), 0.1 + normal(2, 3, seed=2).abs()
    expected = 0.0
    for i, a, b in product(range(count), range(2), range(3)):
        low, high, value = float(lower[a, b]), float(upper[a, b]), float(x[i, a, b])
        expected += ((max(0, value - high) + max(0, low - value)) / ((high - low) / 2)) ** 2
    assert float(priors.box_excess(x, lower, upper, 7)) == pytest.approx(expected / 7, rel=1e-12, abs=1e-15)


def test_box_excess_is_zero_inside_and_one_where_an_entry_is_half_a_range_outside():
    lower, upper = torch.tensor([-1.0, -1.0, 0.0]).double(), torch.tensor([1.0, 1.0, 4.0]).double()
    inside = torch.tensor([[-1.0, 1.0, 4.0], [0.0, 0.5, 0.0]]).double()
    assert float(priors.box_excess(inside, lower, upper, 2)) == 0
    for j, step in product(range(3), (-1, 1)):
        x = ((lower + upper) / 2)[None].clone()
        x[0, j] += step * (upper - lower)[j]
        assert float(priors.box_excess(x, lower, upper, 1)) == pytest.approx(1, rel=1e-12)


@quick
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 5), st.integers(2, 5), st.integers(0, 1000))
def test_total_variation_is_its_loop(count, channels, height, width, seed):
    x = normal(count, channels, height, width, seed=seed)
    expected = 0.0
    for i in range(count):
        rows = [
            abs(float(x[i, c, a + 1, b] - x[i, c, a, b]))
            for c, a, b in product(range(channels), range(height - 1), range(width))
        ]
        columns = [
            abs(float(x[i, c, a, b + 1] - x[i, c, a, b]))
            for c, a, b in product(range(channels), range(height), range(width - 1))
        ]
        expected += sum(rows) / len(rows) + sum(columns) / len(columns)
    assert float(priors.total_variation(x, 9)) == pytest.approx(expected / 9, rel=1e-12)


def test_total_variation_of_a_line_is_that_of_its_one_direction():
    x = normal(3, 1, 1, 5)
    expected = (x[..., 1:] - x[..., :-1]).abs().mean(-1).sum() / 3
    assert float(priors.total_variation(x, 3)) == pytest.approx(float(expected), rel=1e-12)


@quick
@given(st.integers(1, 12), st.data())
def test_micro_batches_add_up_to_the_batch(batch, draw):
    x = normal(batch, 1, 3, 3)
    lower, upper = torch.full((1, 3, 3), -0.5).double(), torch.full((1, 3, 3), 0.7).double()
    cut = draw.draw(st.integers(0, batch))

    def terms(part: slice) -> Tensor:
        values = [
            priors.box_excess(x[part], lower, upper, batch),
            priors.total_variation(x[part], batch),
        ]
        return torch.stack(values)

    assert torch.allclose(terms(slice(None)), terms(slice(cut)) + terms(slice(cut, None)), rtol=1e-12, atol=1e-14)


def test_standardized_inputs_are_at_distance_zero_and_a_factor_on_them_is_not():
    x = torch.randn(5000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    moments = torch.stack([x.mean(0), x.square().mean(0)])
    assert float(priors.standard_distance(moments, 1.0, 1.0)) < 1e-12
    twice = torch.stack([2 * x.mean(0), 4 * x.square().mean(0)])
    assert float(priors.standard_distance(twice, 1.0, 3.0)) == pytest.approx(3.0)  # (2 - 1)^2
    shifted = torch.stack([(x + 3).mean(0), (x + 3).square().mean(0)])
    assert float(priors.standard_distance(shifted, 1.0, 0.0)) == pytest.approx(0.9)  # 3^2 / (1 + 3^2)
    assert float(priors.standard_distance(torch.zeros(2, 7), 1.0, 1.0)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_function_of_the_whole_sum_has_its_own_slope_part_by_part(cut):
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def moments(part):
        return torch.stack([part.sum(0), part.square().sum(0)]) / len(x)

    def distance(m):
        return priors.standard_distance(m, 0.7, 0.3)

    (wanted,) = torch.autograd.grad(distance(moments(x)), x)
    parts = [x[:cut], x[cut:]]
    terms = [priors.share_of(distance, moments(x.detach()), moments(p), len(p) / len(x)) for p in parts]
    assert float(sum(terms).detach()) == pytest.approx(float(distance(moments(x)).detach()))
    (got,) = torch.autograd.grad(sum(terms), x)
    assert torch.allclose(got, wanted, atol=1e-14)
