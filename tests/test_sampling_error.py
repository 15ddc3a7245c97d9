"""Laws of the sampling error of the KKT sum: the 1/B law, its bound, the classes' shares, against per-sample loops in float64."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.trainers import three_bundles
from torch import Tensor, nn
from torch.func import functional_call

from hpc_c2g.bound import concentration
from hpc_c2g.bound.config import DRAWS, BoundConfig
from hpc_c2g.bound.moments import Moments, expectation, measure
from hpc_c2g.bound.sampling_error import row_of, sampling_error
from hpc_c2g.bound.summands import Summands, drawing
from hpc_c2g.classifiers.bundle import save_bundle
from hpc_c2g.classifiers.rates import find_rates
from hpc_c2g.errors import UserError
from hpc_c2g.generators import networks
from hpc_c2g.generators.config import LATENT_DIMENSIONS, FreeImagesConfig, MLPGeneratorConfig
from hpc_c2g.generators.latents import LatentSampler, fresh_latents
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.results import load_run
from hpc_c2g.training.step.bundles import load_bundles
from hpc_c2g.training.step.schedules import gate_width
from launch.bound import bound

CLASSES, REFERENCE, REPEATS = [3, 2], 4000, 100
BATCHES = [8, 24, 64, 192]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A short run against two classifiers of 3 and 2 classes, of uniform and of other rates."""
    folder = tmp_path_factory.mktemp("bound")
    for i, bundle in enumerate(three_bundles()[:2]):
        save_bundle(bundle, folder / str(i))
    train_into(folder / "run", [str(folder / "0"), str(folder / "1")])
    return folder / "run"


def train_into(run_dir: Path, classifiers: list[str], **changes) -> None:
    settings = {
        "steps": 20,
        "global_batch": 40,
        "generator": MLPGeneratorConfig(codes=4, widths=[9]),
        "alpha": AlphaConfig(init=-1.0),
        "log": LogConfig(progress=False),
        "device": "cpu",
        "deterministic": True,
        **changes,
    }
    with mock.patch.object(networks, "OUTPUT_SCALE", 4.0):  # samples far apart
        train(TrainConfig(classifiers, str(run_dir), **settings))


def settings(run_dir: Path, **changes) -> BoundConfig:
    chosen = {"batches": BATCHES, "repeats": REPEATS, "reference_batch": REFERENCE, "device": "cpu"}
    return BoundConfig(str(run_dir), **{**chosen, **changes})


@pytest.fixture(scope="module")
def found(run_dir: Path) -> dict:
    return sampling_error(settings(run_dir))


def summands_of(run_dir: Path, k: int, micro_batch: int = 1024) -> Summands:
    run = load_run(run_dir)
    return Summands(run, load_bundles(run.config.classifiers)[k], k, torch.device("cpu"), micro_batch)


class SmoothReLU(nn.Module):
    """The value of a ReLU, the derivative of width log(1 + e^(z / width))."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, z: Tensor) -> Tensor:
        smooth = self.width * torch.logaddexp(z / self.width, torch.zeros_like(z))
        return smooth + (z.relu() - smooth).detach()


def one_by_one(run_dir: Path, k: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """g_i ``[count, P]`` by a loop over samples, their labels, and the left side, written out from the run's files."""
    run = load_run(run_dir)
    bundle = load_bundles(run.config.classifiers)[k]
    a, C = run.alphas[k], len(bundle.classes)
    gamma = gate_width(run.step, run.config.steps)
    widths = [gamma * float(s) for s in summands_of(run_dir, k).objective.gate_scales.values()]
    model = copy.deepcopy(bundle.model)
    gates = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    for name, width in zip(gates, widths, strict=True):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SmoothReLU(width))
    rates, theta = find_rates(bundle.model).parameters, bundle.parameters
    scale = sum(rates[n] * math.exp(2 * a * rates[n]) * float(t.pow(2).sum()) for n, t in theta.items())
    left = torch.cat([(math.exp(a * rates[n]) * t).flatten() for n, t in theta.items()])
    latents = fresh_latents(0, count, LATENT_DIMENSIONS, C, member=k)
    with torch.no_grad():
        x, h = run.generator.module.double()(latents)
    rows = []
    for i, y in enumerate(latents.labels.tolist()):
        leaves = {n: t.clone().requires_grad_() for n, t in theta.items()}
        logits = functional_call(model, leaves, (x[i : i + 1],))[0]
        value = sum(scale * float(F.softplus(h[i, j])) * (logits[y] - logits[j]) for j in range(C) if j != y)
        grads = torch.autograd.grad(value, list(leaves.values()))
        rows.append(
            torch.cat([(math.exp(a * (1 - rates[n])) * g).flatten() for n, g in zip(leaves, grads, strict=True)])
        )
    return torch.stack(rows) / left.norm(), latents.labels, left / left.norm()


def test_the_traces_and_the_reach_are_those_of_explicit_per_sample_gradients(subtests, run_dir):
    for k in [0, 1]:
        with subtests.test(f"classifier {k}"):
            g, labels, left = one_by_one(run_dir, k, 200)
            summands = summands_of(run_dir, k)
            moments = measure(summands, 200, seed=0)
            apart = [g[labels == c] for c in range(CLASSES[k])]
            assert torch.allclose(summands.left, left, rtol=1e-12, atol=1e-14)
            for own, variance in zip(apart, moments.variances, strict=True):
                assert variance == pytest.approx(float(torch.cov(own.T).trace()), rel=1e-9)
            deviations = [(own - mean).norm(dim=1).max() for own, mean in zip(apart, moments.means, strict=True)]
            assert moments.reach == pytest.approx(float(max(deviations)), rel=1e-9)
            assert moments.reach_overall == pytest.approx(
                float((g - moments.means.mean(0)).norm(dim=1).max()), rel=1e-9
            )
            # the expectation comes from samples of its own: it agrees as well as both are known
            off = float((g.mean(0) - moments.center).square().sum())
            assert off < 6 * (moments.within / 200 + moments.center_variance)


def test_the_kkt_sum_is_the_mean_of_its_summands_and_its_distance_to_the_left_side_is_the_residual(subtests, run_dir):
    for micro_batch, k in itertools.product([1, 7, 1024], [0, 1]):
        with subtests.test(f"classifier {k} {micro_batch=}"):
            g, _, left = one_by_one(run_dir, k, 50)
            summands = summands_of(run_dir, k, micro_batch)
            latents = fresh_latents(0, 50, 4, CLASSES[k], member=k)
            mean = summands.mean(latents)
            assert torch.allclose(mean, g.mean(0), rtol=1e-9, atol=1e-12)
            assert torch.allclose(torch.cat(list(summands.each(latents))), g, rtol=1e-9, atol=1e-12)
            micro_batches = mean.split([t.numel() for t in summands.theta.values()])
            G = {
                n: (p / summands.factors[n]).view_as(t)
                for (n, t), p in zip(summands.theta.items(), micro_batches, strict=True)
            }
            residual = sum(summands.objective.residual(G, summands.alpha).terms.values())
            assert float(residual) == pytest.approx(float((left - g.mean(0)).square().sum()), rel=1e-9)


def test_the_result_does_not_depend_on_the_micro_batch(run_dir):
    few = {"batches": [10, 33], "repeats": 3, "reference_batch": 60}
    results = [sampling_error(settings(run_dir, micro_batch=m, **few))["classifiers"] for m in (1, 7, 1024)]
    assert flat(results[0]) == pytest.approx(flat(results[1]), rel=1e-8)
    assert flat(results[0]) == pytest.approx(flat(results[2]), rel=1e-8)


def flat(value) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in flat(item)]
    if isinstance(value, list):
        return [n for item in value for n in flat(item)]
    return [] if value is None or isinstance(value, str) else [float(value)]


def rows(result: dict, scheme: str) -> list[dict]:
    return [row for row in result["rows"] if row["scheme"] == scheme]


def test_the_measured_error_of_independent_samples_follows_the_law(subtests, found):
    for k, scheme in itertools.product((0, 1), ["independent", "normal"]):
        with subtests.test(f"classifier {k} {scheme}"):
            result = found["classifiers"][k]
            for row in rows(result, scheme):
                # the squared error is a sum of squares: its relative deviation is at most that of chi-square with one degree per batch
                deviation = math.sqrt(2 / REPEATS)
                assert abs(row["error"] ** 2 / row["predicted"] ** 2 - 1) < 4 * deviation, row
                assert row["standard_error"] < 2 * row["error"] * deviation
                noise = 2 * row["error"] * math.sqrt(result["reference"]["residual"] / REPEATS)
                assert abs(row["residual_bias"] - row["residual_bias_predicted"]) < 4 * (
                    noise + row["predicted"] ** 2 * deviation
                )
            exponents = result["exponents"][scheme]
            assert abs(exponents["measured"] - exponents["predicted"]) < 4 * exponents["standard_error"] < 0.2
            if scheme == "independent":
                assert exponents["predicted"] == pytest.approx(-0.5, abs=1e-12)


def test_a_lattice_beats_the_law(subtests, found):
    for k in [0, 1]:
        with subtests.test(f"classifier {k}"):
            for scheme in ("sobol", "stratified"):
                for row in rows(found["classifiers"][k], scheme):
                    if row["batch"] >= 24:
                        assert row["error"] < 0.7 * row["predicted"]
                exponents = found["classifiers"][k]["exponents"][scheme]
                assert exponents["measured"] + 4 * exponents["standard_error"] < -0.6


def test_a_batch_adds_its_squared_error_to_the_residual(subtests, found):
    for k in [0, 1]:
        with subtests.test(f"classifier {k}"):
            result = found["classifiers"][k]
            last = rows(result, "stratified")[-1]
            assert last["error"] < 0.2
            noise = 2 * last["error"] * math.sqrt(last["residual"] / REPEATS)  # of the cross term
            assert abs(last["residual"] - result["reference"]["residual"] - last["error"] ** 2) < 4 * noise


def test_the_bound_is_never_below_the_quantile_of_the_measured_errors(found):
    every = [row for result in found["classifiers"] for row in result["rows"]]
    assert len(every) == 2 * len(DRAWS) * (len(BATCHES) + 1) - len(
        DRAWS
    )  # the second one's own batch, 16, is none of them
    for row in every:
        assert row["predicted"] < row["bound"]
        assert row["quantile"] < row["bound"], row


def test_classes_in_turn_have_the_smaller_error_and_no_imbalance_where_they_divide_the_batch(found):
    for result in found["classifiers"]:
        for fixed, free in zip(rows(result, "normal"), rows(result, "independent"), strict=True):
            assert fixed["predicted"] < free["predicted"]
            divides = fixed["batch"] % CLASSES[found["classifiers"].index(result)] == 0
            assert (fixed["imbalance"] < 1e-12) == divides
            assert free["imbalance"] == 0


def outcomes(values: Tensor, labels: list[list[int]]) -> list[Tensor]:
    """Every possible G(B), equally likely: sample i is any of ``values[c]`` ``[n, P]`` with c any of ``labels[i]``."""
    choices = [[v for c in own for v in values[c]] for own in labels]
    return [torch.stack(chosen).mean(0) for chosen in itertools.product(*choices)]


def test_the_law_is_exact_over_all_outcomes_of_a_finite_distribution(subtests):
    for batch in [1, 2, 3, 4]:
        with subtests.test(f"{batch=}"):
            values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # C, n, P
            means, G = values.mean(1), values.mean((0, 1))
            variances = [float((v - v.mean(0)).square().sum()) / 3 for v in values]
            counts = concentration.cycled_counts(batch, 2)
            fixed = torch.stack(outcomes(values, [[i % 2] for i in range(batch)]))
            shift = concentration.imbalance(means, counts)
            assert torch.allclose(fixed.mean(0) - G, shift)
            spread = float((fixed - fixed.mean(0)).square().sum(1).mean())
            assert concentration.mean_variance(variances, counts) == pytest.approx(spread, rel=1e-12)
            free = torch.stack(outcomes(values, [[0, 1]] * batch))
            overall = sum(variances) / 2 + concentration.between_variance(means)
            assert overall / batch == pytest.approx(float((free - G).square().sum(1).mean()), rel=1e-12)


def test_a_row_over_all_outcomes_is_its_own_prediction(subtests):
    for scheme, batch in itertools.product(["normal", "independent"], [1, 2, 3]):
        with subtests.test(f"{scheme} {batch=}"):
            values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            left = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            variances, G = [float((v - v.mean(0)).square().sum()) / 3 for v in values], values.mean((0, 1))
            moments, residual = Moments(values.mean(1), 0.0, variances, 1.0, 1.0), float((left - G).square().sum())
            means = outcomes(values, [[i % 2] if scheme == "normal" else [0, 1] for i in range(batch)])
            row = row_of(means, moments, left, residual, scheme, batch)
            assert row["error"] == pytest.approx(row["predicted"], rel=1e-12)
            assert row["residual_bias"] == pytest.approx(row["residual_bias_predicted"], rel=1e-9)
            assert row["relative_error"] == pytest.approx(row["error"] / float(G.norm()))
            noisy = row_of(means, Moments(values.mean(1), 0.01, variances, 1.0, 1.0), left, residual, scheme, batch)
            assert noisy["error"] ** 2 == pytest.approx(row["error"] ** 2 - 0.01)


def test_the_reference_knows_its_own_error(run_dir):
    summands = summands_of(run_dir, 0)
    found = [expectation(summands, 100, seed) for seed in range(30)]
    centers = torch.stack([means.mean(0) for means, _ in found])
    spread = float((centers - centers.mean(0)).square().sum()) / 29
    told = sum(variance for _, variance in found) / 30
    assert abs(spread / told - 1) < 4 * math.sqrt(2 / 29 + 2 / (30 * 15))


def test_counts_are_those_of_labels_in_turn():
    for batch, classes in itertools.product(range(1, 12), range(2, 6)):
        labels = [i % classes for i in range(batch)]
        assert concentration.cycled_counts(batch, classes) == [labels.count(c) for c in range(classes)]


def test_the_bound_solves_bernsteins_exponent_and_is_above_bennetts():
    for variance, reach, batch, confidence in itertools.product((1e-4, 0.3), (1.0, 9.0), (3, 500), (0.5, 0.95)):
        r = batch * concentration.bernstein_radius(variance, reach, batch, confidence)
        V = batch**2 * variance
        assert 2 * math.exp(-(r**2) / (2 * (V + reach * r / 3))) == pytest.approx(1 - confidence, rel=1e-9)
        bennett = 2 * math.exp(r / reach - (r / reach + V / reach**2) * math.log1p(r * reach / V))
        assert bennett <= 1 - confidence


def test_the_bound_holds_for_rare_and_large_summands(subtests):
    for chance in [0.5, 0.05, 0.005]:
        with subtests.test(f"{chance=}"):
            batch, trials, draws = 40, 4000, random.Random(0)
            reach, variance = (
                max(chance, 1 - chance),
                chance * (1 - chance) / batch,
            )  # of a coin that falls on 1 by ``chance``
            t = concentration.bernstein_radius(variance, reach, batch, 0.95)
            means = [sum(draws.random() < chance for _ in range(batch)) / batch for _ in range(trials)]
            assert sum(abs(m - chance) >= t for m in means) <= 0.05 * trials


def test_the_exponent_is_that_of_a_power_law_and_its_error_that_of_the_points():
    batches = [10, 30, 100, 400]
    slope, noise = concentration.exponent(batches, [3 * b**-0.7 for b in batches], [0.0] * 4)
    assert (slope, noise) == (pytest.approx(-0.7), 0.0)
    draws, found = random.Random(0), []
    for _ in range(2000):
        errors = [b**-0.5 * (1 + 0.02 * draws.gauss(0, 1)) for b in batches]
        found.append(concentration.exponent(batches, errors, [0.02 * e for e in errors]))
    spread = math.sqrt(sum((s + 0.5) ** 2 for s, _ in found) / len(found))
    assert spread == pytest.approx(found[0][1], rel=0.1)


def test_a_tensor_that_the_classifier_does_not_use_has_no_gradient():
    theta = {"used": torch.ones(2, 3), "idle": torch.ones(4)}
    x, labels, mu = torch.randn(5, 3), torch.zeros(5, dtype=torch.long), torch.tensor([[0.0, 1.0]]).expand(5, 2)
    g = concentration.sample_gradients(lambda t, inputs: inputs @ t["used"].T, theta, x, labels, mu)
    assert list(g) == ["used", "idle"]
    assert torch.equal(g["idle"], torch.zeros(5, 4))
    assert torch.allclose(g["used"], torch.stack([x, -x], 1))


def test_draws_are_a_function_of_seed_size_number_and_classifier():
    def z(scheme: str, batch: int = 12, seed: int = 0, number: int = 5, classifier: int = 0) -> Tensor:
        return drawing(scheme, 3, batch, seed, classifier)(number).z

    for scheme in DRAWS:
        first = z(scheme)
        assert first.shape == (12, LATENT_DIMENSIONS)
        assert torch.equal(first, z(scheme))
        assert not torch.isclose(first, z(scheme, batch=24)[:12]).any()
        for other in (z(scheme, seed=1), z(scheme, number=6), z(scheme, classifier=1)):
            assert not torch.isclose(first, other).any()
        for step in range(8) if scheme != "independent" else ():  # of a run with the same seed
            trained = LatentSampler(LATENT_DIMENSIONS, 3, 12, 0, scheme=scheme).batch(step, 0, 12).z
            assert not torch.isclose(first, trained).any()
    labels = drawing("independent", 3, 3000, 0, 0)(0).labels
    assert (labels.bincount() - 1000).abs().max() < 4 * math.sqrt(3000 * 2 / 9)


def test_it_is_plain_json_in_the_run_directory_and_the_same_again(run_dir):
    few = {"repeats": 3, "reference_batch": 1500}
    first = sampling_error(settings(run_dir, batches=[10, 30], **few))
    text = (run_dir / "sampling_error.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == first
    assert first["uses_real_data"] is False
    assert [r["classifier"] for r in first["classifiers"]] == load_run(run_dir).config.classifiers
    assert sampling_error(settings(run_dir, batches=[10, 30], **few)) == first
    other = sampling_error(settings(run_dir, batches=[10, 30], seed=1, **few))
    assert not set(flat([r["error"] for r in other["classifiers"][0]["rows"]])) & set(flat(first["classifiers"]))
    alone = sampling_error(settings(run_dir, batches=[30], schemes=["sobol"], **few))["classifiers"][0]
    assert alone["rows"][-1] == rows(first["classifiers"][0], "sobol")[-1]
    assert [row["batch"] for row in alone["rows"]] == [24, 30]  # the run's own batch is measured unasked
    assert alone["exponents"] == {"sobol": None}
    own = [(row["scheme"], row["batch"]) for row in first["classifiers"][0]["rows"] if row["own"]]
    assert own == [("stratified", 24)]


def test_the_verb_prints_every_row_and_the_exponents(run_dir, capsys):
    bound(settings(run_dir, batches=[10, 30], repeats=3, reference_batch=1500))
    out = capsys.readouterr().out
    for scheme in DRAWS:
        assert len(re.findall(rf"│ {scheme} +│", out)) == 6
        assert len(re.findall(rf"^{scheme}: error ~ B\^-\d", out, re.MULTILINE)) == 2
    assert f"written: {run_dir}/sampling_error.json" in out


MISTAKES = {
    "batches=[]": {"batches": []},
    "batches=[64, 0]": {"batches": [64, 0]},
    "repeats=1": {"repeats": 1},
    "reference_batch=100 is smaller": {"reference_batch": 100},
    "seed=-1": {"seed": -1},
    "schemes=['lattice']": {"schemes": ["lattice"]},
    "schemes=[]": {"schemes": []},
    "micro_batch=0": {"micro_batch": 0},
    "device=tpu": {"device": "tpu"},
}


def test_a_setting_out_of_range_is_refused_by_name_and_value(subtests):
    for fragment in MISTAKES:
        with subtests.test(fragment):
            with pytest.raises(UserError, match=re.escape(fragment)) as caught:
                BoundConfig("r", **MISTAKES[fragment])
            assert caught.value.hint


def test_what_cannot_be_measured_is_refused(run_dir, tmp_path):
    with pytest.raises(UserError, match=r"run_dir=.*nowhere is no run"):
        sampling_error(settings(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="reference_batch=23 is too small for the run's batch of 24"):
        sampling_error(settings(run_dir, batches=[8], reference_batch=23))
    train_into(tmp_path / "free", [str(run_dir.parent / "0")], generator=FreeImagesConfig(), steps=2)
    with pytest.raises(UserError, match=r"run_dir=.*free holds generator=free"):
        sampling_error(settings(tmp_path / "free"))
