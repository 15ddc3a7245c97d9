import io
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import t as student

from hpc_c2g.evaluation.metric_registry import METRICS
from hpc_c2g.reporting import law_figures, laws, quality_figures
from hpc_c2g.reporting.averages import Average, Curves, average
from hpc_c2g.reporting.drawing import Figure, marks, safe, short, tick
from hpc_c2g.reporting.figures import (
    against_category,
    against_number,
    batch_law,
    efficiency,
    figures,
    learning_curves,
    sampling,
)
from hpc_c2g.reporting.laws import plain

HOSTILE = [
    "<script>alert(1)</script>",
    'a$b_{ "quoted" \'&',
    "$\\frac{1}{$",
    "長い名前 ñ \x00\x1b\n]]>",
    "x" * 500,
    "$",
    "",
]


def row(coverage, residual, runs=3, sd=0.01, **fields):
    """One group; coverage is the metric that the tests tell by, the others follow it."""
    measures = dict.fromkeys((m.name for m in METRICS), 0.5 + coverage / 4) | {
        "coverage": coverage,
        "stationarity": residual,
    }
    return {**fields, "runs": runs, **measures, **{f"{name}_sd": sd * value for name, value in measures.items()}}


BATCHES = [
    row(c, r, global_batch=b)
    for b, c, r in ((50, 0.19, 0.045), (100, 0.29, 0.022), (200, 0.44, 0.0098), (800, 0.43, 0.0096))
]
VARIANTS = [row(c, 0.01, variant=v) for v, c in (("one", 0.47), ("two_disjoint", 0.33), ("four", 0.05))]
SAMPLED = [
    {"classifier": k, "scheme": s, "batch": b, "runs": 3, "error": f * b**-0.5, "predicted": 10 * b**-0.5}
    | {"quantile": 1.3 * f * b**-0.5, "bound": 40 * b**-0.5, "residual_bias": f * f / b}
    for k in (0, 1)
    for s, f in (("independent", 10.0), ("stratified", 1.0))
    for b in (64, 256, 1024)
]
NODES = [
    {"nodes": n, "runs": 3, "samples_per_second": v, "samples_per_second_sd": v / 50}
    for n, v in ((1, 800.0), (2, 1500.0), (4, 2400.0))
]


def curves(groups):
    rng, steps = np.random.default_rng(0), np.arange(10, 500, 10)
    made = {}
    for label in groups:
        runs = [
            Curves(steps, ("loss", "rho"), np.exp(rng.normal(size=(len(steps), 2)) / 9 - steps[:, None] / 200))
            for _ in range(3)
        ]
        made[label] = average(runs)
    return made


def look(drawn):
    """Every picture is whole, its words carry numbers, its letters are no text that a browser must find a font for."""
    for one in drawn:
        root = ElementTree.fromstring(one.svg)
        assert root.tag.endswith("svg")
        assert not list(root.iter("{http://www.w3.org/2000/svg}text"))
        with Image.open(io.BytesIO(one.png)) as picture:
            assert min(picture.size) > 200
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,80}", one.name)
        assert one.title
        assert re.search(r"\d", one.alt)
        assert one.alt.isprintable()
    return drawn


@pytest.fixture
def words(monkeypatch):
    """Figures are described but not drawn, which takes most of a second each; returns the words of the only one."""
    for module in (quality_figures, law_figures):
        monkeypatch.setattr(
            module, "figure", lambda name, title, alt, *_: Figure(safe(name), title, plain(alt), lambda kind: b"")
        )

    def only(told):
        (one,) = told
        return one.alt

    return only


# laws


@given(
    st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True),
    st.floats(1e-6, 1e3) | st.just(0.0),
    st.floats(1e-6, 1e3) | st.just(0.0),
)
@example([50, 100], 0.0, 1.0)
@example([50, 100], 1.0, 0.0)
def test_the_fit_finds_the_law_that_made_the_residuals(batches, limit, slope):
    if limit == slope == 0:
        return
    residuals = [limit + slope / b for b in batches]
    law = laws.inverse_law(batches, residuals)
    assert law.deviation < 1e-6
    assert law.where in batches
    # each part alone is known as well as the residuals show it beside the other
    top, spread = max(residuals), max(residuals) - min(residuals)
    if slope == 0 or (limit == 0 and spread > 1e-6 * top) or spread > 0.1 * top > limit / 1e3 > 0:
        assert law.limit == pytest.approx(limit, rel=1e-5, abs=1e-7 * top)
        assert law.slope == pytest.approx(slope, rel=1e-5, abs=1e-7 * top * max(batches))


@given(
    st.lists(st.tuples(st.integers(1, 10**5), st.floats(1e-6, 1e3)), min_size=2, max_size=8, unique_by=lambda p: p[0])
)
def test_the_fit_is_never_negative_and_tells_its_own_deviation(points):
    batches, residuals = zip(*points, strict=True)
    law = laws.inverse_law(batches, residuals)
    assert law.limit >= 0
    assert law.slope >= 0
    off = [abs(r / law(b) - 1) for b, r in points]
    assert law.deviation == pytest.approx(max(off))
    assert off[batches.index(law.where)] == pytest.approx(max(off))


def test_a_residual_that_only_falls_as_one_over_the_batch_has_no_limit():
    law = laws.inverse_law([50, 100, 200, 400], [0.4, 0.2, 0.1, 0.05])
    assert law.limit == 0
    assert law.slope == pytest.approx(20)


@given(st.floats(-3, 3), st.lists(st.integers(1, 10**6), min_size=2, max_size=9, unique=True))
def test_the_exponent_is_that_of_a_power(power, x):
    assert laws.exponent(x, [b**power for b in x]) == pytest.approx(power, abs=1e-6)


@given(st.integers(2, 50), st.floats(0, 1e3))
def test_the_interval_is_students(runs, deviation):
    half = laws.half_width({"runs": runs, "coverage_sd": deviation}, "coverage")
    assert half == pytest.approx(student.interval(0.95, runs - 1)[1] * deviation / math.sqrt(runs))


@pytest.mark.parametrize(
    "broken", [{"runs": 1, "coverage_sd": None}, {"runs": 3}, {"runs": 3, "coverage_sd": math.nan}]
)
def test_no_deviation_no_interval(broken):
    assert math.isnan(laws.half_width(broken, "coverage"))


def test_fields_that_follow_another_tell_no_lines_apart():
    groups = [
        row(0.1, 0.1, variant=f"nodes{n}", nodes=n, global_batch=1024 * n, seedless=s) for n in (1, 2) for s in "ab"
    ]
    assert laws.swept(groups) == ["variant", "nodes", "global_batch", "seedless"]
    assert laws.companions(groups, "nodes") == ["variant", "global_batch"]
    assert list(laws.lines(groups, "nodes")) == ["a", "b"]


def test_a_change_that_the_intervals_could_hide_is_none():
    near = [row(0.40, 1.0, sd=0.2, b=1), row(0.42, 1.0, sd=0.2, b=2)]
    assert "changes no more than its intervals" in laws.trend("coverage", "b", [near])
    assert "It rises, from 0.2 at b=1 to 0.42 at 2." in laws.trend(
        "coverage", "b", [[row(0.2, 1, b=1), row(0.42, 1, b=2)]]
    )
    assert laws.trend("coverage", "b", [near[:1]]) == ""


@pytest.mark.parametrize(
    ("name", "best"), [("coverage", "0.9 at b"), ("proximity", "0.2 at a"), ("diversity", "0.9 at b")]
)
def test_best_is_high_low_or_near_one(name, best):
    rows = [
        ("a", {name: 0.2, "runs": 1}),
        ("b", {name: 0.9, "runs": 1}),
        ("c", {name: 1.4 if name == "diversity" else 0.5}),
    ]
    assert f"best {best}" in laws.extremes(laws.MEASURES[name], rows)


@given(st.text(max_size=200))
def test_names_are_safe_and_texts_are_short(text):
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,80}", safe(text))
    assert len(short(text)) <= 56
    assert short(text).isprintable()


@pytest.mark.parametrize(
    ("x", "shown"), [(0.002, "0.002"), (1600, "1600"), (1e-5, "10⁻⁵"), (2e-7, "2×10⁻⁷"), (1e12, "10¹²")]
)
def test_axes_have_plain_numbers(x, shown):
    assert tick(x) == shown


def test_lines_differ_without_color():
    looks = [(m["marker"], str(m["linestyle"])) for m in map(marks, range(8))]
    assert len({m for m, _ in looks}) == len({s for _, s in looks}) == 8


# figures


def test_all_figures_of_a_study():
    drawn = look(figures(BATCHES, SAMPLED, curves(["a", "b"]), None))
    assert [f.name for f in drawn] == ["quality-global_batch", "batch_law", "sampling", "learning_curves"]


def test_the_same_data_give_the_same_bytes_whatever_the_users_settings(monkeypatch):
    import matplotlib

    def draw() -> list[tuple[str, bytes]]:
        return [(one.svg, one.png) for one in (*batch_law(BATCHES), *sampling(SAMPLED[:6]))]

    first = draw()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "svg.hashsalt", None)
    assert draw() == first
    assert matplotlib.rcParams["font.size"] == 30


def test_tables_need_no_matplotlib_and_figures_no_pyplot():
    code = """
import sys
from hpc_c2g.reporting import page
from hpc_c2g.reporting.figures import batch_law
assert "matplotlib" not in sys.modules and "jinja2" not in sys.modules
assert batch_law([{"global_batch": b, "stationarity": 1 / b, "runs": 1} for b in (1, 2, 4)])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_gives_no_figures():
    assert figures([], [], {}, None) == []
    assert figures(BATCHES[:1], [], {"a": {}}, {1: 5.0}) == []
    assert figures([{"runs": 3, "global_batch": b} for b in (1, 2)], [], {}, None) == []


def test_words_name_the_best_and_the_worst_batch_and_the_real_data(words):
    told = words(against_number(BATCHES))
    assert "Coverage (uses real data; higher is better): best 0.44 ± 0.011 at global_batch=200, worst 0.19" in told
    assert "Relative KKT residual (no data; lower is better): best 0.0096" in told
    assert "It falls, from 0.045 at global_batch=50 to 0.0096 at 800." in told


def test_words_name_the_best_and_the_worst_variant(words):
    told = words(against_category(VARIANTS))
    assert "best 0.47 ± 0.012 at variant=one, worst 0.05 ± 0.0012 at variant=four" in told


def test_numbers_and_words_together_give_both_figures(words):
    groups = [row(0.1 * k + b / 1000, 0.01, variant=v, b=b) for k, v in enumerate("xyz") for b in (10, 200)]
    drawn = [*against_number(groups), *against_category(groups)]
    assert [f.name for f in drawn] == ["quality-b", "quality-variant"]
    assert "best 0.4 ± 0.0099 at b=200 (z)" in drawn[0].alt
    assert "With b, of 3 lines it rises in 3." in drawn[0].alt
    assert "at variant=z (b=200)" in drawn[1].alt


def test_lines_beyond_the_eighth_are_faint_and_told():
    groups = [row(0.1 + k / 100, 0.01, b=b, k=f"k{k}") for k in range(11) for b in (1, 2)]
    (drawn,) = look(against_number(groups))
    assert "3 of 11 combinations of the other fields are drawn faintly" in drawn.alt


def test_many_categories_go_on_in_a_second_figure(words):
    groups = [row(0.1, 0.01, variant=f"v{k}") for k in range(30)]
    assert [f.name for f in against_category(groups)] == ["quality-variant", "quality-variant-2"]


def test_a_field_that_changes_along_is_told(words):
    told = words(against_number([{**r, "rate": f"r{k}"} for k, r in enumerate(BATCHES)]))
    assert "rate changes along with global_batch" in told


def test_one_run_has_no_interval():
    groups = [{**r, "runs": 1} | {k: None for k in r if k.endswith("_sd")} for r in BATCHES]
    for drawn in look([*against_number(groups), *batch_law(groups)]):
        assert "best 0.44 at " in drawn.alt
        assert "±" not in drawn.alt


def test_holes_are_drawn_around():
    groups = [
        {**BATCHES[0], "coverage": math.nan, "stationarity": None},
        {**BATCHES[1], "diversity": math.inf},
        *BATCHES[2:],
    ]
    look(figures(groups, [], {}, None))


@pytest.mark.parametrize("hole", [None, math.nan, math.inf, -math.inf, "n/a", True])
def test_what_is_no_number_is_left_out(hole, words):
    groups = [{**r, "coverage": hole, "coverage_sd": hole} if k == 2 else r for k, r in enumerate(BATCHES)]
    groups.append({"global_batch": 1600, "runs": 1, "diversity": hole, "stationarity": hole})
    for told in (f.alt for f in [*against_number(groups), *batch_law(groups)]):
        assert "overage (uses real data; higher is better): best 0.43" in told
        assert not re.search(r"\b(nan|inf|None|True)\b", told)
    assert figures([{"b": b, "runs": 1, "coverage": hole} for b in (1, 2)], [], {}, None) == []


def test_the_batch_law_tells_its_fit(words):
    groups = [row(0.3, 0.005 + 2 / b, global_batch=b) for b in (50, 100, 200, 400)]
    assert "r_inf = 0.005, c = 2, largest relative deviation 0 %" in words(batch_law(groups))
    assert batch_law(groups[:2]) == []
    assert batch_law(VARIANTS) == []


def test_the_batch_law_has_a_fit_per_line(words):
    groups = [row(0.3, a + 2 / b, global_batch=b, a=a) for b in (50, 100, 200) for a in (0.01, 0.02)]
    told = words(batch_law(groups))
    assert "a=0.01: r_inf = 0.01, c = 2" in told
    assert "a=0.02: r_inf = 0.02, c = 2" in told


def test_sampling_tells_slopes_and_whether_the_bound_holds(words):
    told = words(sampling(SAMPLED))
    assert "classifier 0, independent: largest 1.25 at B=64, smallest 0.312 at B=1024, slope -0.50" in told
    assert "classifier 1, stratified" in told
    assert "0.1 to 0.1 times the 1/sqrt(B) law" in told
    assert "below the bound throughout" in told
    assert "not squared" in told
    over = [{**r, "quantile": 1e9} for r in SAMPLED if r["classifier"] == 0]
    assert "above the bound at B=[64, 256, 1024]" in words(sampling(over))


def test_an_error_too_small_to_be_seen_is_told(words):
    assert "1 too small to be measured" in words(sampling([{**SAMPLED[0], "batch": 128}, {**SAMPLED[0], "error": 0.0}]))


def test_efficiency_is_speed_per_node_over_that_of_the_fewest(words):
    told = words(efficiency(NODES, {1: 900.0, 4: 2700.0}))
    assert "1: 800 ± 40 (100 %), 2: 1500 ± 75 (94 %), 4: 2400 ± 120 (75 %)" in told
    assert "Predicted by the plan: 1: 900 (100 %), 4: 2700 (75 %)." in told


def test_without_a_plan_its_command_is_told(words):
    told = words(efficiency([{**r, "variant": f"nodes{r['nodes']}"} for r in NODES], None))
    assert "c2g plan ... out=DIR/plan.json" in told
    assert efficiency(BATCHES, {1: 2.0}) == []


def test_curves_go_on_in_a_second_figure_after_eight_groups():
    drawn = look(learning_curves(curves([f"group {k}" for k in range(10)]), ["loss", "rho", "absent"]))
    assert [f.name for f in drawn] == ["learning_curves", "learning_curves-2"]
    assert "loss, lowest and highest end: group" in drawn[0].alt


def test_curves_survive_what_is_not_finite_and_long_runs():
    n = 20_000
    mean = np.where(np.arange(n) % 5, 1.0 + np.arange(n), np.nan)
    broken = Average(np.arange(n), mean, mean - 1e9, mean * np.inf, np.ones(n))
    whole = Average(np.arange(n), mean, mean - 1e9, mean, np.ones(n))
    assert learning_curves({"a": {"loss": broken}}, ["loss"]) == []
    (one,) = look(learning_curves({"a": {"loss": whole}, "b": {"loss": broken}}, ["loss"]))
    assert len(one.svg) < 100_000


def test_hostile_labels_are_drawn_as_they_are():
    groups = [
        row(0.1 + b / 50, 1 / b, variant=v, **{"global_batch": b, "$<b>": b % 2}) for v in HOSTILE for b in (1, 2, 3)
    ]
    sampled = [{**r, "scheme": v} for v in HOSTILE[:3] for r in SAMPLED[:3]]
    made = [
        against_category(groups[:9]),
        batch_law(groups),
        sampling(sampled),
        learning_curves(curves(HOSTILE), ["loss"]),
    ]
    for one in look([f for each in made for f in each]):
        assert "<script" not in one.svg


def test_the_names_of_figures_differ():
    groups = [{"a$": k, "a*": k**2, "runs": 1, "coverage": 0.1 * k} for k in (1, 2)]
    assert sorted(f.name for f in figures(groups, [], {}, None)) == ["quality-a", "quality-a-2"]


def test_shares_stay_within_their_range_and_a_wide_residual_is_logarithmic():
    from matplotlib.figure import Figure as Canvas

    from hpc_c2g.reporting.quality_figures import against

    wide = [row(0.99, 0.5, sd=0.5, b=1), row(0.9, 0.01, sd=0.5, b=2)]
    for name, high, scale in (("coverage", 1.1, "linear"), ("stationarity", 3.0, "log")):
        axes = Canvas().subplots()
        against(laws.MEASURES[name], "b", {"": wide})(axes)
        assert axes.get_ylim()[1] < high
        assert axes.get_yscale() == scale
