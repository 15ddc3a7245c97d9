"""Laws of the registry of loss terms: one entry makes a setting, a loss with its gradient, a scalar and a curve."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch
from helpers.trainers import config, normed, three_bundles, trainer

from hpc_c2g.classifiers.bundle import Bundle, build_model
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.errors import UserError
from hpc_c2g.kkt import loss_terms
from hpc_c2g.kkt.loss_terms import BATCH_STATISTICS, IMAGE, INPUT_MOMENTS, LossInputs, LossTerm, Weight
from hpc_c2g.training.config.objective import PriorConfig, weights_schema
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.step.objective import active_terms


def brightness(s: LossInputs, weight: float) -> torch.Tensor:
    """Mean square of the samples' sums."""
    return weight * s.x.flatten(1).sum(1).square().sum() / s.batch


@pytest.fixture
def with_brightness(monkeypatch):
    """The registry with one more prior."""
    term = LossTerm("brightness", (Weight("prior.brightness", 0.0, "Weight of brightness."),), brightness)
    monkeypatch.setattr(loss_terms, "LOSS_TERMS", (*loss_terms.LOSS_TERMS, term))
    return weights_schema("prior")


def test_one_entry_makes_a_setting_a_loss_and_a_curve(with_brightness):
    assert with_brightness().brightness == 0.0
    assert "    brightness: Weight of brightness." in with_brightness.__doc__
    with pytest.raises(UserError, match=r"prior\.brightness=-1.0"):
        with_brightness(brightness=-1.0)
    assert loss_terms.loss_names()[-1] == "brightness"
    bundle = three_bundles()[0]
    plain, bright = (trainer([bundle], config(5, prior=with_brightness(brightness=w))) for w in (0.0, 0.25))
    (share,) = bright.shares
    x = bright.engine.module(share.sampler.batch(1, 0, share.objective.batch))[0].detach()
    expected = 0.25 * sum(float(sample.sum()) ** 2 for sample in x) / len(x)
    before, after = plain(1).scalars, bright(1).scalars
    assert "brightness" not in before
    assert after["brightness"] == pytest.approx(expected, rel=1e-9)
    assert after["loss"] == pytest.approx(before["loss"] + expected, rel=1e-9)
    assert after["gradient/x"] != pytest.approx(before["gradient/x"], rel=1e-6)


def test_settings_of_the_weights_are_those_of_the_registry():
    run = TrainConfig(classifier="c", run_dir="r")
    named = {weight.setting: weight.default for term in loss_terms.LOSS_TERMS for weight in term.weight}
    fields = {f"{own}.{f.name}" for own in ("duality", "prior") for f in dataclasses.fields(getattr(run, own))}
    assert fields == set(named)
    assert {name: operator.attrgetter(name)(run) for name in named} == named
    assert len(set(loss_terms.loss_names())) == len(loss_terms.LOSS_TERMS)


def test_a_term_is_left_out_where_a_run_lacks_what_it_needs():
    run = config(prior=PriorConfig(total_variation=1.0, statistics=1.0, mean=1.0))
    net = build_model({"target": "mlp", "input_shape": [16], "classes": 3, "width": 5})
    flat = Bundle(net, {}, list("abc"), (16,), Normalization.constant((16,)))
    for bundle, there in ((three_bundles()[0], {IMAGE}), (normed(), {IMAGE, BATCH_STATISTICS}), (flat, set())):
        names = {term.name for term in active_terms(run, bundle)}
        lacking = {t.name for t in loss_terms.LOSS_TERMS if not t.needs <= there | {INPUT_MOMENTS}}
        assert names == {"feasibility", "box", "slackness", "total_variation", "statistics", "standard"} - lacking


def leaves(settings: object) -> list[str]:
    """Names of all settings, with those of the default generator; ``deepspeed`` is one."""
    found = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        nested = dataclasses.is_dataclass(value)
        found += [f"{field.name}.{name}" for name in leaves(value)] if nested else [field.name]
    return found


def test_train_has_at_most_50_settings():
    names = leaves(TrainConfig(classifier="c", run_dir="r"))
    assert {"steps", "prior.mean", "deepspeed", "generator.widths"} <= set(names)
    assert len(names) <= 50, names
