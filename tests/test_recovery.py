"""The laws of ``recovered``: a stated false rate, exact intervals, chance where nothing is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from hpc_c2g.data.dataset import Dataset
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation.comparison import Comparison
from hpc_c2g.evaluation.recovery import (
    as_csv,
    auc,
    clopper_pearson,
    least_controls,
    p_values,
    recovered,
    relative_scores,
    report,
    sentence,
    threshold_at,
)

SCORES = st.lists(st.integers(0, 30).map(float), min_size=1, max_size=60).map(np.array)


@given(controls=SCORES, rate=st.sampled_from([0.5, 0.25, 0.1, 0.02]))
def test_no_more_controls_pass_than_the_rate_allows_and_one_more_would(controls, rate):
    if len(controls) < least_controls(rate):
        with pytest.raises(UserError, match=rf"{len(controls)} held-out images cannot support a false rate of"):
            threshold_at(controls, rate)
        return
    threshold = threshold_at(controls, rate)
    allowed = int(rate * len(controls) + 1e-9)
    assert (controls < threshold).sum() <= allowed
    assert (controls <= threshold).sum() > allowed or threshold == controls.max()


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 100), (0.001, 1000), (0.1, 10), (0.03, 34)])
def test_a_rate_needs_its_inverse_in_controls(rate, needed):
    assert least_controls(rate) == needed
    recovered(np.zeros(3), np.ones(needed), rate)
    with pytest.raises(UserError, match="held_out_size"):
        recovered(np.zeros(3), np.ones(needed - 1), rate)


@given(total=st.integers(1, 300), share=st.floats(0, 1))
def test_intervals_are_scipys_exact_ones(total, share):
    count = round(share * total)
    wanted = binomtest(count, total).proportion_ci(0.95, method="exact")
    assert clopper_pearson(count, total) == pytest.approx((wanted.low, wanted.high), abs=1e-10)


@given(images=SCORES, controls=SCORES)
def test_auc_is_scikit_learns(images, controls):
    truth = np.r_[np.ones(len(images)), np.zeros(len(controls))]
    assert auc(images, controls) == pytest.approx(roc_auc_score(truth, -np.r_[images, controls]), abs=1e-12)


@given(images=SCORES, controls=SCORES)
def test_p_values_count_the_controls_that_are_as_near(images, controls):
    wanted = [(1 + sum(c <= i for c in controls)) / (1 + len(controls)) for i in images]
    assert p_values(images, controls) == pytest.approx(wanted)


def test_samples_that_know_nothing_recover_the_false_rate():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        points = rng.normal(size=(1300, 4))
        samples = rng.normal(size=(300, 4))
        scores = np.linalg.norm(points[:, None] - samples[None], axis=-1).min(1)
        shares.append(recovered(scores[:300], scores[300:], 0.01).share)
    assert np.mean(shares) == pytest.approx(0.01, abs=0.003)  # 6 standard errors


def test_copies_are_recovered_and_their_interval_says_how_sure():
    rng = np.random.default_rng(1)
    train, unseen = rng.normal(size=(100, 8)), rng.normal(size=(1000, 8))
    samples = np.r_[train[:48], rng.normal(size=(300, 8)) * 3]
    scores = [np.linalg.norm(x[:, None] - samples[None], axis=-1).min(1) for x in (train, unseen)]
    found = recovered(*scores, 0.01)
    assert found.count >= 48
    assert found.low < found.share < found.high
    assert (found.images, found.controls) == (100, 1000)


def test_an_image_of_the_reference_set_never_passes():
    assert relative_scores(np.array([0.0, 1.0]), np.array([0.0, 2.0])).tolist() == [np.inf, 0.5]


def comparison(shape=(1, 8, 8), held_out=400):
    generator = torch.Generator().manual_seed(0)
    train, real = (
        Dataset(torch.rand(n, *shape, generator=generator), torch.arange(n) % 2, ["a", "b"], (0.0, 1.0))
        for n in (20, held_out)
    )
    near = train.samples[:8] + 1e-3
    samples = torch.cat([near, torch.rand(60, *shape, generator=generator)])
    generated = Dataset(samples, torch.arange(len(samples)) % 2, ["a", "b"], (0.0, 1.0))
    return Comparison(generated, train, lambda x: torch.zeros(len(x)), real, real, 0)


def test_every_score_finds_the_copies_and_states_the_rates_that_its_controls_support():
    found = report(comparison())
    assert {name: (one["controls"], [r["rate"] for r in one["rates"]]) for name, one in found.items()} == {
        "distance": (400, [0.01]),
        "relative": (200, [0.01]),
        "ssim": (400, [0.01]),
    }
    assert all(one["rates"][0]["count"] >= 8 and one["auc"] > 0.6 for one in found.values())
    assert set(report(comparison((5,)))) == {"distance", "relative"}
    few = report(comparison((5,), 150))
    assert [len(few[name]["rates"]) for name in few] == [1, 0]


def test_the_sentence_has_the_share_its_interval_and_its_chance_level():
    found = report(comparison())
    found["distance"]["rates"][0] |= {"count": 8, "low": 0.191, "high": 0.639}
    assert sentence(found) == (
        "8 of 20 training samples are recovered (1 % false; 95 % interval 19 to 64 %; 400 held-out samples)"
    )
    few = report(comparison((5,), 50))
    assert sentence(few) == "50 held-out samples are too few to state a false rate of 1 %"


def test_the_table_lists_every_training_sample_the_most_exposed_first():
    c = comparison()
    lines = [line.split(",") for line in as_csv(c).splitlines()]
    assert lines[0][:5] == ["index", "label", "distance", "distance_rank", "distance_p"]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert sorted(int(row["index"]) for row in rows) == list(range(20))
    assert {int(row["index"]) for row in rows[:8]} == set(range(8))
    for row in rows:
        assert float(row["distance"]) == pytest.approx(float(c.to_sample[0][int(row["index"])]), rel=1e-5)
        nearer = int((c.real_to_sample[0] <= c.to_sample[0][int(row["index"])]).sum())
        assert int(row["distance_rank"]) == 1 + nearer
        assert float(row["distance_p"]) == pytest.approx((1 + nearer) / 401, rel=1e-5)
