"""Laws of the scale: how the residual moves with alpha, where alpha starts, where the feedback drives it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.func import functional_call

from hpc_c2g.classifiers.models import CNN, MLP, ResidualCNN
from hpc_c2g.classifiers.rates import find_rates
from hpc_c2g.errors import UserError
from hpc_c2g.kkt import alpha_control, options, stationarity

BATCH, CLASSES, ALPHA = 8, 3, -0.4
LABELS = torch.arange(BATCH) % CLASSES
quick = settings(deadline=None, max_examples=40)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPE = [2, 6, 6]
NETS = {
    "linear": lambda: MLP(SHAPE, CLASSES, depth=1, bias="all"),
    "mlp": lambda: MLP(SHAPE, CLASSES, 6, 3, bias="all"),
    "homogeneous mlp": lambda: MLP(SHAPE, CLASSES, 6, 3, "leaky_relu", "first"),
    "cnn": lambda: CNN(SHAPE, CLASSES, 3, 3, bias="all", pooling="max"),
    "residual cnn": lambda: ResidualCNN(SHAPE, CLASSES, 3, bias="all"),
}


def problem(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, float]]:
    model = NETS[name]().double()
    theta = {k: 0.5 * normal(*p.shape, seed=seed) for seed, (k, p) in enumerate(model.named_parameters())}
    return model, theta, find_rates(model).parameters


def exact_sum(model: nn.Module, theta: dict[str, Tensor], mu: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = normal(BATCH, *SHAPE, seed=9)
    return stationarity.kkt_sum(lambda t, x: functional_call(model, t, (x,)), theta, x, LABELS, mu)


MU = normal(BATCH, CLASSES, seed=10).abs() * (torch.arange(CLASSES) != LABELS[:, None])


def test_margins_at_the_scaled_weights_are_scaled_margins(subtests):
    for name in NETS:
        with subtests.test(name):
            model, theta, rates = problem(name)
            given_there, _ = exact_sum(model, theta, MU)
            at_scaled, _ = exact_sum(model, stationarity.scaled(theta, ALPHA, rates), MU)
            assert torch.allclose(at_scaled, math.exp(ALPHA) * given_there, rtol=1e-9, atol=1e-12)


def test_euler_links_the_weighted_margins_to_the_sum(subtests):
    for name in NETS:
        with subtests.test(name):
            model, theta, rates = problem(name)
            margins, G = exact_sum(model, theta, MU)
            total = sum(rates[k] * float((theta[k] * G[k]).sum()) for k in theta)
            assert float((MU * margins).sum()) == pytest.approx(total, rel=1e-10)


def test_residual_at_the_given_weights_is_the_residual_at_the_scaled_weights(subtests):
    for form, name in product(options.LEFT_SIDES, NETS):
        with subtests.test(f"{name} {form}"):
            model, theta, rates = problem(name)
            c, scaled = stationarity.left_side(rates, form), stationarity.scaled(theta, ALPHA, rates)
            given_there = stationarity.residual(theta, exact_sum(model, theta, MU)[1], rates, c, ALPHA)
            at_scaled = stationarity.residual(scaled, exact_sum(model, scaled, MU)[1], rates, c, 0.0)
            for k in theta:
                assert torch.allclose(given_there[k], at_scaled[k], rtol=1e-9, atol=1e-10)
            S, S_scaled = (
                stationarity.multiplier_scale(stationarity.squared_norms(t), rates, c, a)
                for t, a in ((theta, ALPHA), (scaled, 0.0))
            )
            assert pytest.approx(S_scaled, rel=1e-12) == S


def test_at_a_stationary_point_the_multipliers_weigh_the_scaled_margins_to_their_scale():
    x, rates, c = normal(BATCH, 5), {"W": 1.0}, {"W": 1.0}

    def phi(theta: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ theta["W"].T

    _, G = stationarity.kkt_sum(phi, {"W": torch.zeros(CLASSES, 5).double()}, x, LABELS, MU)
    theta = {"W": math.exp(-ALPHA) * G["W"]}  # solves e^a W = G, as G does not depend on W, whose rate is 1
    margins, G = stationarity.kkt_sum(phi, theta, x, LABELS, MU)
    r = stationarity.residual(theta, G, rates, c, ALPHA)["W"]
    assert float(r.norm()) < 1e-12 * float(G["W"].norm())
    S = stationarity.multiplier_scale(stationarity.squared_norms(theta), rates, c, ALPHA)
    assert float((MU * math.exp(ALPHA) * margins).sum()) == pytest.approx(S, rel=1e-12)


RATES = {"a": 0.5, "b": 0.25, "c": 1.0, "d": 1.0}
FORMS = list(product(options.LEFT_SIDES, options.WEIGHTINGS))


def slow_loss(theta, G, c, alpha, weights) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for k, t in theta.items():
        left, right = c[k] * torch.exp(alpha * RATES[k]) * t, torch.exp(alpha * (1 - RATES[k])) * G[k]
        for entry in (left - right).flatten():
            loss = loss + weights[k] * entry**2
    return loss


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(-3, 3), st.sampled_from(FORMS))
def test_loss_and_direction_are_those_of_autograd(seed, alpha, form):
    shapes = {"a": (3, 4), "b": (4,), "c": (2, 2, 2), "d": (1,)}
    theta = {k: normal(*s, seed=seed + i) for i, (k, s) in enumerate(shapes.items())}
    G = {k: normal(*s, seed=seed + 50 + i).requires_grad_() for i, (k, s) in enumerate(shapes.items())}
    c = stationarity.left_side(RATES, form[0])
    weights = stationarity.residual_weights(stationarity.squared_norms(theta), RATES, c, alpha, form[1])
    loss = slow_loss(theta, G, c, torch.tensor(alpha, dtype=torch.float64), weights)
    by_sum = torch.autograd.grad(loss, list(G.values()))
    with torch.no_grad():
        r = stationarity.residual(theta, G, RATES, c, alpha)
        terms, v = stationarity.terms_and_direction(theta, G, weights, RATES, c, alpha)
        _, heavier = stationarity.terms_and_direction(theta, G, weights, RATES, c, alpha, weight=3.0)
    assert float(sum(terms.values())) == pytest.approx(loss.item(), rel=1e-12)
    for got, expected in zip(v.values(), by_sum, strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-14)
    for k in theta:
        assert torch.allclose(heavier[k], 3 * v[k], rtol=1e-12)
        assert float(terms[k]) == pytest.approx(weights[k] * float(r[k].square().sum()), rel=1e-12)


ALPHAS = st.floats(-10, 10)


@quick
@given(ALPHAS, st.floats(0, 5), st.floats(-10, 1e6), st.floats(0.001, 0.5), st.floats(0.5, 2), st.floats(0.1, 50))
def test_feedback_never_passes_the_start_nor_moves_faster_than_its_rate(alpha, above, rho, rate, target, gain):
    alpha0 = alpha + above
    after = alpha_control.feedback(alpha, alpha0, rho, rate, target, gain)
    assert after <= alpha0
    assert abs(after - alpha) <= rate * (1 + 1e-9) + 1e-12


@quick
@given(ALPHAS, st.floats(1.001, 1e4), st.floats(0.5, 2))
def test_feedback_moves_down_where_margins_are_above_the_target_and_up_below(alpha, factor, target):
    assert alpha_control.feedback(alpha, alpha + 1, factor * target, 0.02, target, 1.0) < alpha
    assert alpha_control.feedback(alpha, alpha + 1, target / factor, 0.02, target, 1.0) > alpha
    assert alpha_control.feedback(alpha, alpha, target / factor, 0.02, target, 1.0) == alpha  # already at the start
    assert alpha_control.feedback(alpha, alpha + 1, -factor, 0.02, target, 1.0) == pytest.approx(alpha + 0.02)


@quick
@given(ALPHAS, st.floats(0.1, 50), st.floats(-0.9, 0.9))
def test_near_the_target_the_feedback_is_proportional_to_the_error(alpha, gain, share):
    rho = 1.3 * math.exp(share / gain)
    after = alpha_control.feedback(alpha, alpha + 1, rho, rate=0.1, target=1.3, gain=gain)
    assert after == pytest.approx(alpha - 0.1 * share, abs=1e-9)


def test_feedback_settles_where_the_scaled_margin_is_the_target():
    alpha, margin = 2.0, 3.0
    for _ in range(1000):
        alpha = alpha_control.feedback(alpha, 2.0, math.exp(alpha) * margin, 0.02, 1.05, 1.0)
    assert math.exp(alpha) * margin == pytest.approx(1.05, rel=1e-6)


@quick
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0.1, 10))
def test_alpha_starts_at_the_geometric_mean_of_the_probes(probe, ascended, caution):
    alpha = alpha_control.initial_alpha(probe, ascended, caution)
    assert math.exp(alpha) * math.sqrt(probe * ascended) == pytest.approx(caution, rel=1e-9)


def test_a_classifier_without_a_margin_on_probes_is_refused(subtests):
    for probe, ascended in [(0, 1), (1, 0), (-1, -1), (math.nan, 1), (1, math.nan), (math.inf, 1), (1, math.inf)]:
        with subtests.test(f"{probe=} {ascended=}"), pytest.raises(UserError, match="no margin on probes"):
            alpha_control.initial_alpha(probe, ascended)


LOWER, UPPER = -1 - normal(4, seed=1).abs(), 1 + normal(4, seed=2).abs()
WEIGHT = normal(CLASSES, 4, seed=3)


def linear(x: Tensor) -> Tensor:
    return x @ WEIGHT.T


def test_probe_margin_is_the_mean_gap_over_the_box():
    seen: list[Tensor] = []
    margin = alpha_control.probe_margin(lambda x: (seen.append(x), linear(x))[1], LOWER, UPPER, seed=5, count=2000)
    x = torch.cat(seen)
    assert x.shape == (2000, 4)
    assert bool(((x >= LOWER) & (x <= UPPER)).all())
    assert torch.allclose(x.mean(0), (LOWER + UPPER) / 2, atol=0.15)  # uniform over the whole box
    assert torch.allclose(x.std(0), (UPPER - LOWER) / 12**0.5, rtol=0.1)
    gaps = [sorted(row)[-1] - sorted(row)[-2] for row in linear(x).tolist()]
    assert margin == pytest.approx(sum(gaps) / len(gaps), rel=1e-10)


def best_margin(label: int) -> float:
    """max over the box of min_j m_j, the linear program max t with (w_y - w_j) x >= t."""
    others = [j for j in range(CLASSES) if j != label]
    rows = [[*(WEIGHT[j] - WEIGHT[label]).tolist(), 1.0] for j in others]
    bounds = [*zip(LOWER.tolist(), UPPER.tolist(), strict=True), (None, None)]
    return -linprog([0.0] * 4 + [-1.0], A_ub=rows, b_ub=[0.0] * len(others), bounds=bounds).fun


def test_ascended_margin_reaches_the_best_of_the_box():
    best = sum(best_margin(label) for label in range(CLASSES)) / CLASSES
    margin = alpha_control.ascended_margin(linear, LOWER, UPPER, CLASSES, seed=0, count=30)
    assert 0.95 * best < margin <= best * (1 + 1e-9)
    assert margin > 2 * alpha_control.probe_margin(linear, LOWER, UPPER, seed=0)


def test_probes_are_a_function_of_the_seed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [alpha_control.probe_margin(linear, LOWER, UPPER, s, 50) for s in (0, 0, 1)]
    ascended = [alpha_control.ascended_margin(linear, LOWER, UPPER, CLASSES, s, 6, steps=3) for s in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    assert ascended[0] == ascended[1] != ascended[2]
    assert torch.equal(torch.get_rng_state(), state)
