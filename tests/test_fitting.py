"""Laws of fitting: the margin flow, ordinary training, initial weights, imported weights, and one bundle per folder."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from hpc_c2g.classifiers.bundle import CERTIFICATE, load_bundle, load_state_dict_file
from hpc_c2g.classifiers.models import CNN, MLP
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.load import load_split
from hpc_c2g.errors import UserError
from hpc_c2g.fitting import make
from hpc_c2g.fitting.config import (
    ClassifierConfig,
    ImportFitConfig,
    InitConfig,
    MarginFitConfig,
    NormalizationConfig,
    OrdinaryFitConfig,
)
from hpc_c2g.fitting.fit import fit_margin, fit_ordinary, initialize, smoothed_margin
from hpc_c2g.fitting.make import make_classifier
from hpc_c2g.kkt.margins import pairwise_margins, smallest_margins

LABELS = torch.arange(15) % 3
X = 2 * F.one_hot(LABELS, 4).double() + 0.4 * torch.randn(15, 4, generator=torch.Generator().manual_seed(0)).double()


def net(seed: int = 0, **options) -> nn.Module:
    model = MLP([4], 3, **{"width": 12, **options}).double()
    initialize(model, InitConfig(), seed)
    return model


def margin(model: nn.Module) -> float:
    with torch.no_grad():
        return float(smallest_margins(pairwise_margins(model(X), LABELS), LABELS).min())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_margin_fit_reaches_its_target_and_is_a_function_of_the_seed(depth):
    models = [net(seed, depth=depth) for seed in (0, 0, 1)]
    steps = [fit_margin(model, X, LABELS, MarginFitConfig(target_margin=20, lr=0.2)) for model in models]
    assert all(20 <= margin(model) < 30 for model in models)
    assert all(not model.training for model in models)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    assert steps[0] == steps[1] > 1


def test_a_step_of_the_flow_lowers_the_loss_by_its_rate():
    model = net()
    fit_margin(model, X, LABELS, MarginFitConfig(target_margin=1))
    for rate in (1e-2, 1e-3):
        before = smoothed_margin(model(X), LABELS).item()
        with pytest.raises(UserError):
            fit_margin(model, X, LABELS, MarginFitConfig(target_margin=1e6, lr=rate, max_steps=1))
        assert before - smoothed_margin(model(X), LABELS).item() == pytest.approx(rate, rel=20 * rate)


def test_margin_fit_gives_up_with_the_margin_it_reached():
    with pytest.raises(UserError, match=r"fit\.max_steps=7 passed .* target 500") as caught:
        fit_margin(net(), X, LABELS, MarginFitConfig(target_margin=500, max_steps=7))
    assert "fit.max_steps" in caught.value.hint


def test_margin_fit_stops_where_the_loss_is_not_finite():
    model = net()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="diverged at step 1"):
        fit_margin(model, X, LABELS, MarginFitConfig())


def test_reports_rise_to_the_target():
    seen: list[tuple[int, float]] = []
    fit_margin(net(), X, LABELS, MarginFitConfig(target_margin=20), lambda step, value: seen.append((step, value)))
    assert [step for step, _ in seen] == list(range(50, 50 * len(seen) + 1, 50))
    assert all(a < b for (_, a), (_, b) in itertools.pairwise(seen))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_ordinary_fit_learns_a_separable_set_and_is_a_function_of_the_seed(optimizer, dtype):
    config = OrdinaryFitConfig(optimizer=optimizer, lr=0.05, batch_size=4, epochs=30, dtype=dtype)
    models = [net(depth=3, batch_norm=True) for _ in range(3)]
    steps = [fit_ordinary(m, X, LABELS, config, seed) for m, seed in zip(models, (0, 0, 1), strict=True)]
    assert steps == [30 * 4] * 3
    assert models[0].head.weight.dtype == getattr(torch, dtype)
    assert bool((models[0](X.to(getattr(torch, dtype))).argmax(1) == LABELS).all())
    assert not models[0].training
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_a_batch_of_one_is_left_out_under_batch_norm():
    config = OrdinaryFitConfig(batch_size=7, epochs=2)
    assert fit_ordinary(net(batch_norm=True), X, LABELS, config, 0) == 2 * 2  # 15 = 7 + 7 + 1


def test_batches_of_one_train_a_net_without_batch_norm():
    model = net()
    before = model.head.weight.clone()
    fit_ordinary(model, X, LABELS, OrdinaryFitConfig(batch_size=1, epochs=1, dtype="float64"), 0)
    assert not torch.equal(model.head.weight, before)


def test_eval_mode_computes_what_was_fitted_up_to_the_variances_n_minus_one():
    model = net(depth=3, batch_norm=True)
    initialize(model, InitConfig(default=True), 0)
    fit_margin(model, X, LABELS, MarginFitConfig(target_margin=5, lr=0.2, max_steps=1000))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert [n.momentum for n in norms] == [0.1, 0.1]
    features = model.linear1(X)
    assert torch.allclose(norms[0].running_mean, features.mean(0), rtol=1e-10)
    assert torch.allclose(norms[0].running_var, features.var(0), rtol=1e-10)
    for norm in norms:
        norm.running_var.mul_(14 / 15)
    evaluated, trained = model(X), model.train()(X)
    assert torch.allclose(evaluated, trained, rtol=1e-9, atol=1e-9)


def test_initial_weights_have_the_deviations_of_the_settings():
    model = MLP([1, 30, 30], 10, width=400, depth=4, bias="all", batch_norm=True)
    torch.nn.init.constant_(model.norm1.weight, 3.0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    initialize(model, InitConfig(first=0.02, hidden=0.3, head=2.0), 0)
    assert torch.equal(torch.get_rng_state(), before)
    deviations = {"linear1": 0.02, "linear2": 0.3 / 20, "linear3": 0.3 / 20, "head": 2 / 20 / 3**0.5}
    for name, expected in deviations.items():
        assert float(getattr(model, name).weight.detach().std()) == pytest.approx(expected, rel=0.05)
        assert float(getattr(model, name).bias.detach().std()) == pytest.approx(
            0.02, rel=0.15 if name != "head" else 0.6
        )
    assert float(model.head.weight.detach().abs().max()) <= 0.1
    assert float(model.norm1.weight.detach().min()) == 3


def test_initial_weights_are_a_function_of_the_seed_and_fan_in_counts_a_kernel():
    first, again, other = (CNN([1, 8, 8], 3, width=64, depth=3) for _ in range(3))
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        initialize(model, InitConfig(), seed)
    assert same(first, again)
    assert not same(first, other)
    assert float(first.conv2.weight.detach().std()) == pytest.approx(0.3 / 24, rel=0.05)


@pytest.mark.parametrize("default", [True, False])
def test_normalization_weights_start_where_they_are_told_to(default):
    model = MLP([4], 3, width=12, depth=3, batch_norm=True)
    initialize(model, InitConfig(default=default, norm=0.1), 0)
    for norm in (model.norm1, model.norm2):
        assert torch.equal(norm.weight.detach(), torch.full((12,), 0.1))
        assert not bool(norm.bias.detach().any())
    with pytest.raises(UserError, match=r"init\.norm=0.*init\.norm > 0, or null"):
        InitConfig(norm=0.0)


def test_default_initialization_is_that_of_torch():
    model = MLP([4], 3, width=12)
    initialize(model, InitConfig(default=True), 3)
    torch.manual_seed(3)
    assert same(model, MLP([4], 3, width=12))


def test_settings_out_of_range_are_refused(subtests):
    for (field, value), kind in itertools.product(
        [("lr", 0.0), ("dtype", "float16")], [MarginFitConfig, OrdinaryFitConfig]
    ):
        with subtests.test(f"{kind.__name__} {field}={value}"), pytest.raises(UserError, match=rf"fit\.{field}="):
            kind(**{field: value})


def refused(match: str, path: Path) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_state_dict_file(path)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("marker",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(2), "evil": Evil()}, "model.pt")
    refused("cannot be read as weights", Path("model.pt"))
    assert not Path("marker").exists()
    torch.load("model.pt", weights_only=False)
    assert Path("marker").exists()  # the trap works


WEIGHT = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2, dtype=torch.float64)}


@pytest.mark.parametrize("form", ["plain", "checkpoint", "safetensors"])
def test_weights_of_every_form_are_read(tmp_path, form):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(WEIGHT, path)
    else:
        torch.save(WEIGHT if form == "plain" else {"epoch": 3, "state_dict": WEIGHT}, path)
    read = load_state_dict_file(path)
    assert read.keys() == WEIGHT.keys()
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in WEIGHT.items())


def test_files_without_a_dictionary_of_tensors_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    refused("does not exist", path)
    for content in ([torch.zeros(2)], {"weight": 3}, {"a": {"b": torch.zeros(1)}}, torch.zeros(2)):
        torch.save(content, path)
        refused("holds no dictionary of tensors", path)
    torch.save(nn.Linear(2, 2), path)
    refused("cannot be read as weights", path)
    for damaged in (path, tmp_path / "w.safetensors"):
        damaged.write_bytes(b"nothing")
        refused("cannot be read as weights", damaged)


def settings_of(tmp_path: Path, **changes) -> ClassifierConfig:
    values = {
        "out": str(tmp_path / "out"),
        "data": DataConfig(train_size=30, held_out_size=50),
        "model": {"_target_": "mlp", "width": 20},
        "fit": MarginFitConfig(target_margin=1.0),
    }
    return ClassifierConfig(**{**values, **changes})


def never(*_, **__):
    raise AssertionError("must not be called")


def test_a_classifier_is_made_once_and_taken_again_for_equal_settings(tmp_path, monkeypatch):
    bundle, record = make_classifier(settings_of(tmp_path))
    assert record["smallest_margin"] >= 1
    assert record["train_accuracy"] == 1
    assert 0.2 < record["held_out_accuracy"] < 1
    train = load_split(settings_of(tmp_path).data).train
    assert bundle.classes == train.classes
    assert torch.allclose(bundle.normalization.mean, train.samples.double().mean(0), atol=1e-12)
    monkeypatch.setattr(make, "fit_margin", never)
    again, second = make_classifier(settings_of(tmp_path))
    assert again.fingerprint == bundle.fingerprint
    assert second == record
    for other in (
        {"seed": 1},
        {"model": {"_target_": "mlp", "width": 21}},
        {"fit": MarginFitConfig(target_margin=2.0)},
    ):
        with pytest.raises(UserError, match="holds another classifier"):
            make_classifier(settings_of(tmp_path, **other))
    assert load_bundle(tmp_path / "out").fingerprint == bundle.fingerprint


def test_overwrite_replaces_the_classifier_and_its_record(tmp_path):
    first, _ = make_classifier(settings_of(tmp_path))
    (tmp_path / "out" / CERTIFICATE).write_text("[]")
    second, record = make_classifier(settings_of(tmp_path, seed=1, overwrite=True))
    assert not (tmp_path / "out" / CERTIFICATE).exists()  # it was of the first
    assert load_bundle(tmp_path / "out").fingerprint == second.fingerprint != first.fingerprint
    assert make_classifier(settings_of(tmp_path, seed=1))[1] == record
    with pytest.raises(UserError, match="holds another classifier"):
        make_classifier(settings_of(tmp_path))


def test_a_record_is_never_taken_for_that_of_another_bundle(tmp_path, monkeypatch):
    first, _ = make_classifier(settings_of(tmp_path))
    monkeypatch.setattr(make, "write_atomically", never)  # killed between the bundle and its record
    with pytest.raises(AssertionError):
        make_classifier(settings_of(tmp_path, seed=1, overwrite=True))
    there = make.read_record(tmp_path / "out").get("settings", {}).get("seed")
    assert there is None or (there == 0) == (load_bundle(tmp_path / "out").fingerprint == first.fingerprint)


IMPORT = {"model": {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}, "input_shape": [3]}
CONSTANT = NormalizationConfig(kind="constant", mean=0.5, scale=2.0, value_range=[-1.0, 1.0])


def test_imported_weights_never_touch_data(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "load_split", never)
    torch.save(WEIGHT, tmp_path / "w.pt")
    fit = ImportFitConfig(state_dict=str(tmp_path / "w.pt"))
    config = settings_of(tmp_path, fit=fit, normalization=CONSTANT, classes=["cat", "dog"], **IMPORT)
    bundle, record = make_classifier(config)
    assert torch.equal(bundle.model.weight, WEIGHT["weight"])
    assert bundle.classes == ["cat", "dog"]
    assert set(record) == {"settings", "weights_sha256"}
    lower, upper = load_bundle(tmp_path / "out").normalization.box()
    assert (lower.tolist(), upper.tolist()) == ([-0.75] * 3, [0.25] * 3)
    for faulty in ({"classes": None}, {"normalization": NormalizationConfig()}, {"classes": 3}):
        changes = {"fit": fit, "normalization": CONSTANT, "classes": 2, "out": str(tmp_path / "b"), **IMPORT, **faulty}
        with pytest.raises(UserError):
            make_classifier(settings_of(tmp_path, **changes))
        assert not (tmp_path / "b").exists()


def test_standard_inputs_have_mean_0_and_deviation_1_over_the_training_part_but_where_it_is_constant(tmp_path):
    data = DataConfig(train_size=20, classes=[0, 1])
    config = settings_of(tmp_path, data=data, normalization=NormalizationConfig(kind="standard"))
    x = make_classifier(config)[0].normalization.normalize(load_split(data).train.samples.double()).flatten(1)
    deviation = x.std(0, correction=0)
    assert torch.allclose(x.mean(0), torch.zeros(64, dtype=torch.float64), atol=1e-12)
    assert bool((deviation == 0).any())
    assert torch.allclose(deviation[deviation > 0], torch.ones(1, dtype=torch.float64))
