"""Laws of the signatures of failure on made-up lines: what fires, and what is never judged. Runs made to fail: tests/test_watch.py."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_c2g.monitoring.signatures import BY_NAME, SIGNATURES, UTMOST, WINDOW, judged, levels

GOOD = {
    "stationarity": 0.02,
    "gradient/generator": 0.1,
    "diversity": 0.8,
    "unsupported": 0.05,
    "roughness": 0.45,
    "saturation": 0.4,
    "class_mass": 0.7,
}
FAILING = {
    "mode_collapse": {"diversity": 0.19},
    "mode_invention": {"unsupported": 0.51},
    "poor_quality": {"roughness": 0.81},
    "starvation": {"class_mass": 0.049},
}


def firing(lines: list[dict[str, float]]) -> set[str]:
    return {name for name, level in levels(lines).items() if level > 1}


def test_a_good_run_fires_nothing_and_has_a_level_of_every_signature():
    found = levels([GOOD] * WINDOW)
    assert found.keys() == BY_NAME.keys()
    assert max(found.values()) < 1


def test_one_classifier_that_fails_fires_its_signature_alone(subtests):
    for name, prefixes in product(
        FAILING, [("",), ("classifier0/", "classifier1/"), ("classifier0/solution1/", "classifier1/solution0/")]
    ):
        with subtests.test(f"{name} {prefixes}"):
            line = {f"{p}{k}": v for p in prefixes for k, v in GOOD.items()} | GOOD
            line |= {f"{prefixes[-1]}{k}": v for k, v in FAILING[name].items()}
            if len(prefixes) > 1:
                line = {k: v for k, v in line.items() if "/" in k or k == "stationarity"}
            assert firing([line] * WINDOW) == {name}


@pytest.mark.parametrize("change", [{"saturation": 0.96}, {"stationarity": 1.01}])
def test_the_second_face_of_a_signature_fires_it(change):
    assert len(firing([GOOD | change] * WINDOW)) == 1


def test_instability_is_a_spike_growth_or_oscillation_by_a_factor_ten(subtests):
    for name, shape in product(["stationarity", "gradient/generator"], ["spike", "growth", "oscillation"]):
        with subtests.test(f"{name} {shape}"):
            base = GOOD[name]
            factors = {
                "spike": [1.0] * 7 + [11.0] + [1.0] * 2,
                "growth": [1.6**i for i in range(WINDOW)],
                "oscillation": [1.0, 11.0] * 5,
            }[shape]
            lines = [GOOD | {name: base * f} for f in factors]
            if shape == "oscillation":  # its older half has low values in its middle
                lines = [GOOD | {name: base * f} for f in [1.0, 11.0, 1.0, 11.0, 1.0] * 2]
            assert "instability" in firing(lines)
            gentle = [GOOD | {name: base * min(f, 5.0)} for f in (1.1**i for i in range(WINDOW))]
            assert firing(gentle) == set()


def test_one_bad_line_fires_no_signature_but_instability():
    bad = GOOD | {k: v for change in FAILING.values() for k, v in change.items()}
    assert firing([GOOD] * (WINDOW - 1) + [bad]) == set()


def test_what_lines_do_not_have_is_left_out():
    assert levels([{"step": 1, "loss": 2.0}] * WINDOW) == {}
    tabular = {k: v for k, v in GOOD.items() if k not in ("roughness", "saturation")}
    assert levels([tabular] * WINDOW).keys() == BY_NAME.keys() - {"poor_quality"}


def test_a_collapse_to_nothing_has_the_utmost_level():
    assert levels([GOOD | {"diversity": 0.0}] * WINDOW)["mode_collapse"] == UTMOST


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 5) for _ in GOOD]), min_size=WINDOW, max_size=2 * WINDOW))
def test_levels_are_functions_of_what_is_judged_in_the_last_window(values):
    lines = [dict(zip(GOOD, row, strict=True)) for row in values]
    noisy = [line | {"samples_per_second": float(i), "wire/seconds": 1.0} for i, line in enumerate(lines)]
    assert levels(noisy) == levels([judged(line) for line in lines[-WINDOW:]])


def test_every_signature_gives_its_reason_and_its_advice_in_a_line():
    for signature in SIGNATURES:
        for text in (signature.reason, signature.advice):
            assert text
            assert "\n" not in text
