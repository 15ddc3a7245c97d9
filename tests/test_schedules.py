"""Laws of the schedules: their end points, and that they only fall (but for the warm-up)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpc_c2g.training.config.objective import GateConfig, StationarityConfig
from hpc_c2g.training.config.train import OptimizerConfig
from hpc_c2g.training.step.schedules import gate_width, lr_factor, own_scale

quick = settings(deadline=None, max_examples=40)
STEPS = st.integers(1, 200)


@quick
@given(STEPS, st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.05, 1))
def test_gates_narrow_geometrically_from_start_to_end(steps, start, end, fraction):
    assume(start >= end)
    config = GateConfig(start, end, fraction)
    widths = [gate_width(config, step, steps) for step in range(1, steps + 1)]
    assert widths[0] == start
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(widths))
    for step, width in enumerate(widths, start=1):
        done = min(1, (step - 1) / max(1, fraction * steps))
        assert math.log(width) == pytest.approx((1 - done) * math.log(start) + done * math.log(end), abs=1e-9)
        if step - 1 >= max(1, fraction * steps):
            assert width == pytest.approx(end, rel=1e-12)


def test_gates_are_at_their_end_for_the_last_fifth_of_a_run():
    config = GateConfig(0.5, 0.05, 0.8)
    assert [gate_width(config, step, 100) for step in (1, 41, 81, 100)] == pytest.approx(
        [0.5, math.sqrt(0.5 * 0.05), 0.05, 0.05]
    )


@quick
@given(STEPS, st.floats(0.05, 1))
def test_what_is_before_a_normalization_comes_into_its_own_scale_evenly(steps, fraction):
    config = StationarityConfig(anneal_fraction=fraction)
    powers = [own_scale(config, step, steps) for step in range(1, steps + 2)]
    assert powers[0] == 0
    assert powers[-1] == 1
    assert powers == pytest.approx([min(1, i / (fraction * steps)) for i in range(steps + 1)], abs=1e-12)


def test_without_annealing_it_is_in_its_own_scale_from_the_first_step():
    assert [own_scale(StationarityConfig(anneal_fraction=0), step, 10) for step in (1, 5, 10)] == [1, 1, 1]


@quick
@given(STEPS, st.floats(0, 1))
def test_rate_falls_from_one_to_its_final_fraction(steps, final):
    config = OptimizerConfig(warmup_fraction=0.0, final_fraction=final)
    factors = [lr_factor(config, step, steps) for step in range(1, steps + 1)]
    assert factors[0] == 1
    assert all(a >= b for a, b in pairwise(factors))
    assert final - 1e-12 <= factors[-1]
    assert lr_factor(config, steps + 1, steps) == pytest.approx(final, abs=1e-12)


def test_rate_is_half_way_down_at_half_time():
    config = OptimizerConfig(final_fraction=0.2)
    assert lr_factor(config, 51, 100) == pytest.approx(0.6, rel=1e-12)
    assert lr_factor(config, 26, 100) > 0.8  # a cosine, no straight line


@quick
@given(st.integers(20, 200), st.floats(0.1, 0.9))
def test_warm_up_is_linear_and_then_gone(steps, fraction):
    warm = OptimizerConfig(warmup_fraction=fraction, final_fraction=0.1)
    cold = OptimizerConfig(warmup_fraction=0.0, final_fraction=0.1)
    for step in range(1, steps + 1):
        ratio = lr_factor(warm, step, steps) / lr_factor(cold, step, steps)
        assert ratio == pytest.approx(min(1, step / (fraction * steps)), rel=1e-9)
