"""Laws of the schedules: their end points, and that they only fall."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_c2g.training.step.schedules import GATE_END, GATE_START, gate_width, lr_factor, own_scale

quick = settings(deadline=None, max_examples=40)
STEPS = st.integers(1, 200)


@quick
@given(STEPS)
def test_gates_narrow_geometrically_from_start_to_end(steps):
    start, end = GATE_START, GATE_END
    widths = [gate_width(step, steps) for step in range(1, steps + 1)]
    assert widths[0] == start
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(widths))
    for step, width in enumerate(widths, start=1):
        done = min(1, (step - 1) / (0.8 * steps))
        assert math.log(width) == pytest.approx((1 - done) * math.log(start) + done * math.log(end), abs=1e-9)
        if step - 1 >= max(1, 0.8 * steps):
            assert width == pytest.approx(end, rel=1e-12)


def test_gates_are_at_their_end_for_the_last_fifth_of_a_run():
    assert [gate_width(step, 100) for step in (1, 41, 81, 100)] == pytest.approx(
        [0.5, math.sqrt(0.5 * 0.05), 0.05, 0.05]
    )


@quick
@given(STEPS)
def test_tensors_before_a_normalization_come_into_their_own_scale_evenly(steps):
    powers = [own_scale(step, steps) for step in range(1, steps + 2)]
    assert powers[0] == 0
    assert powers[-1] == 1
    assert powers == pytest.approx([min(1, i / (0.6 * steps)) for i in range(steps + 1)], abs=1e-12)


@quick
@given(STEPS)
def test_learning_rate_falls_from_one_to_its_final_fraction(steps):
    factors = [lr_factor(step, steps) for step in range(1, steps + 1)]
    assert factors[0] == 1
    assert all(a >= b for a, b in pairwise(factors))
    assert factors[-1] >= 0.05 - 1e-12
    assert lr_factor(steps + 1, steps) == pytest.approx(0.05, abs=1e-12)


def test_learning_rate_is_half_way_down_at_half_time():
    assert lr_factor(51, 100) == pytest.approx(0.525, rel=1e-12)
    assert lr_factor(26, 100) > 0.8  # a cosine, no straight line
