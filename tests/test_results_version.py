"""Laws of results' versions: a stage whose numbers change under the same settings must raise its version."""

from __future__ import annotations

import math

import pytest
from helpers.golden import TOLERANCE, Golden, changes, read_golden, run_golden_study

from hpc_c2g.studies.config import STAGES

BEFORE = {"train": Golden("a", {"loss": 1.0, "rho": 0.5})}


def test_a_stage_that_changes_its_results_raises_its_version(tmp_path):
    assert "\n".join(changes(read_golden(), run_golden_study(tmp_path)).values()) == ""


def test_every_stage_has_golden_numbers():
    recorded = read_golden()
    assert tuple(recorded) == STAGES
    for golden in recorded.values():
        assert len([v for v in golden.numbers.values() if v not in (0.0, 1.0) and math.isfinite(v)]) >= 5


@pytest.mark.parametrize(
    ("after", "advice"),
    [
        (Golden("a", {"loss": 1.0 + 0.5 * TOLERANCE, "rho": 0.5}), ""),
        (Golden("b", {"loss": 1.0, "rho": 0.5}), ""),  # other settings, the same results: such as a field renamed
        (Golden("a", {"loss": 1.0 + 2 * TOLERANCE, "rho": 0.5}), "raise RESULTS_VERSION['train']"),
        (Golden("a", {"loss": -1.0, "rho": 0.5}), "loss: 1.0 recorded, -1.0 now"),
        (Golden("a", {"loss": math.nan, "rho": 0.5}), "raise RESULTS_VERSION['train']"),
        (Golden("a", {"loss": 1.0}), "rho: 0.5 recorded, None now"),
        (Golden("a", {"loss": 1.0, "rho": 0.5, "more": 1.0}), "raise RESULTS_VERSION['train']"),
        (Golden("b", {"loss": 2.0, "rho": 0.5}), "with its settings or versions: run `python -m tests.helpers.golden`"),
    ],
)
def test_the_advice_depends_on_what_changed(after, advice):
    found = changes(BEFORE, {"train": after})
    assert advice in found.get("train", "")
    assert bool(found) == bool(advice)


def test_results_that_were_never_recorded_are_named():
    assert "python -m tests.helpers.golden" in changes({}, BEFORE)["train"]


def test_a_raised_version_is_another_id(monkeypatch):
    from helpers import golden

    from hpc_c2g.studies.results_version import RESULTS_VERSION

    before = {t.stage: t.id for t in golden.plan(golden.STUDY, [{}]).values()}
    monkeypatch.setitem(RESULTS_VERSION, "evaluate", RESULTS_VERSION["evaluate"] + 1)
    after = {t.stage: t.id for t in golden.plan(golden.STUDY, [{}]).values()}
    assert {stage for stage in STAGES if before[stage] != after[stage]} == {"evaluate"}
