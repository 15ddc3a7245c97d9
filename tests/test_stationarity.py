"""Laws of stationarity: micro-batched cotangents are the gradient of one joint graph, Euler, the three left sides."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hpc_c2g.classifiers.models import CNN, MLP, ResidualCNN
from hpc_c2g.classifiers.rates import find_rates
from hpc_c2g.errors import UserError
from hpc_c2g.kkt import duality, options, priors, stationarity
from hpc_c2g.kkt.gates import GatedClassifier

BATCH, CLASSES, GAMMA, ALPHA = 8, 3, 0.3, -0.4
LABELS = torch.arange(BATCH) % CLASSES
FORMS = list(product(options.LEFT_SIDES, options.WEIGHTINGS))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module) -> nn.Module:
    """Float64 in eval mode; every tensor as after training, no running statistic 0 or 1."""
    model = model.double().eval()
    with torch.no_grad():
        for seed, (name, tensor) in enumerate(model.state_dict().items()):
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
            if name.endswith("running_var"):
                tensor.copy_(0.5 + normal(*tensor.shape, seed=seed).abs())
            elif tensor.is_floating_point():
                tensor.copy_(1.5 * normal(*tensor.shape, seed=seed) / fan_in**0.5)
    return model


class UserNet(nn.Module):
    """Grouped strided convolution, GroupNorm, LayerNorm and a concatenation of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.norm1, self.act1 = nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.GroupNorm(2, 4), nn.ReLU()
        self.other, self.act2 = nn.Conv2d(2, 3, 2, 2), nn.LeakyReLU(0.2)
        self.mix, self.norm2, self.act3 = nn.Linear(7 * 9, 6), nn.LayerNorm(6), nn.ReLU()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([self.act1(self.norm1(self.grouped(x))), self.act2(self.other(x))], 1)
        return self.head(self.act3(self.norm2(self.mix(maps.flatten(1)))))


SHAPE = (2, 6, 6)
NETS = {
    f"mlp{depth}-{bias}-{act}": functools.partial(MLP, SHAPE, CLASSES, 6, depth, act, bias)
    for depth, bias, act in product((1, 2, 3), ("all", "first", "none"), ("relu", "leaky_relu"))
    if depth > 1 or act == "relu"
}
NETS |= {
    f"cnn-{pooling}{'-norm' * norm}": functools.partial(
        CNN, SHAPE, CLASSES, 3, 3, bias="all", batch_norm=norm, pooling=pooling
    )
    for pooling, norm in product(("avg", "max"), (False, True))
}
NETS |= {
    f"residual{'-norm' * norm}": functools.partial(ResidualCNN, SHAPE, CLASSES, 3, 2, bias="all", batch_norm=norm)
    for norm in (False, True)
}
NETS["user"] = UserNet


PROBES = normal(50, *SHAPE, seed=1)
LOWER, UPPER = torch.full(SHAPE, -1.0, dtype=torch.float64), torch.full(SHAPE, 1.5, dtype=torch.float64)


class SmoothReLU(nn.Module):
    """The value of a leaky ReLU, the derivatives of slope z + (1 - slope) width log(1 + e^(z / width))."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope, self.width = slope, torch.ones(())

    def forward(self, z: Tensor) -> Tensor:
        smooth = self.slope * z + (1 - self.slope) * self.width * torch.logaddexp(z / self.width, torch.zeros_like(z))
        return smooth + (torch.where(z > 0, z, self.slope * z) - smooth).detach()


def smoothed(model: nn.Module) -> nn.Module:
    """A copy with smooth gates as wide as GAMMA times the root mean square that enters them at the probes."""
    model = copy.deepcopy(model)

    def set_width(gate: SmoothReLU, args: tuple[Tensor]) -> None:
        gate.width = GAMMA * args[0].detach().pow(2).mean().sqrt()

    hooks = []
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.ReLU, nn.LeakyReLU)):
            gate = SmoothReLU(getattr(module, "negative_slope", 0.0))
            hooks.append(gate.register_forward_pre_hook(set_width))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, gate)
    model(PROBES)
    for hook in hooks:
        hook.remove()
    return model


@functools.lru_cache
def problem(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, float], Tensor, Tensor]:
    """A net, its parameters and rates, samples that leave the box now and then, multipliers."""
    model = randomised(NETS[name]())
    mu = normal(BATCH, CLASSES, seed=3).abs() * F.one_hot(LABELS, CLASSES).logical_not()
    theta = {k: p.detach() for k, p in model.named_parameters()}
    return model, theta, find_rates(model).parameters, normal(BATCH, *SHAPE, seed=2), mu


@functools.lru_cache
def joint_gradients(name: str) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """d/dx and d/dmu of the whole loss, written out over one graph of the whole batch."""
    model, theta, rates, x, mu = problem(name)
    x, mu = x.clone().requires_grad_(), mu.clone().requires_grad_()
    theta = {k: t.clone().requires_grad_() for k, t in theta.items()}
    logits = functional_call(smoothed(model), theta, (x,))
    m = {
        (i, j): logits[i, LABELS[i]] - logits[i, j] for i, j in product(range(BATCH), range(CLASSES)) if j != LABELS[i]
    }
    total = sum(mu[ij] * margin for ij, margin in m.items())
    G = dict(zip(theta, torch.autograd.grad(total, list(theta.values()), create_graph=True), strict=True))
    ea, gradients = math.exp(ALPHA), {}
    for form, weighting in FORMS:
        top = max(rates.values())
        c = {k: {"identity": 1, "rates": r, "top_rate": top if r == top else 0}[form] for k, r in rates.items()}
        left = {k: c[k] * ea ** rates[k] * theta[k].detach() for k in theta}
        norm = sum(float(t.pow(2).sum()) for t in left.values())
        loss, S = torch.zeros((), dtype=torch.float64), 0.0
        for k in theta:
            own = float(left[k].pow(2).sum())
            weight = 1 / (len(theta) * own) if weighting == "per_tensor" and own > 0 else 1 / norm
            if weighting == "scale_free" and not own:
                weight = float((ea ** rates[k] * theta[k].detach()).pow(2).sum()) / norm**2
            loss = loss + weight * (left[k] - ea ** (1 - rates[k]) * G[k]).pow(2).sum()
            S += rates[k] * ea ** rates[k] * float((theta[k].detach() * left[k]).sum())
        for i in range(BATCH):
            smallest = torch.stack([ea * m[i, j] for j in range(CLASSES) if j != LABELS[i]]).min()
            loss = loss + 0.3 * F.relu(1 - smallest) ** 2 / BATCH
            outside = F.relu(x[i] - 1.5) + F.relu(-1.0 - x[i])
            loss = loss + 0.5 * (outside / 1.25).pow(2).sum() / BATCH
        loss = loss + 0.7 * sum(mu[ij] * F.relu(ea * margin - 1) for ij, margin in m.items()) / S
        gradients[form, weighting] = torch.autograd.grad(loss, [x, mu], retain_graph=True)
    return gradients


@functools.lru_cache
def gated(name: str) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    model, theta, *_ = problem(name)
    phi = GatedClassifier(model)
    widths = {gate: GAMMA * s for gate, s in phi.pre_activation_scales(theta, PROBES).items()}
    return lambda parameters, inputs: phi(parameters, widths, inputs)


@functools.lru_cache
def micro_batched_sum(name: str, micro_batch: int) -> dict[str, Tensor]:
    """G without a graph, which depends on no form."""
    _, theta, _, x, mu = problem(name)
    G = {k: torch.zeros_like(t) for k, t in theta.items()}
    for part in zip(x.split(micro_batch), LABELS.split(micro_batch), mu.split(micro_batch), strict=True):
        for k, g in stationarity.kkt_sum(gated(name), theta, *part)[1].items():
            G[k] += g
    return G


def sharded_gradients(name: str, micro_batch: int, form: str, weighting: str) -> tuple[Tensor, Tensor]:
    """The same as the toolkit computes them: G without a graph, the residual, cotangents by micro-batch."""
    _, theta, rates, x, mu = problem(name)
    G = micro_batched_sum(name, micro_batch)
    micro_batches = list(zip(x.split(micro_batch), LABELS.split(micro_batch), mu.split(micro_batch), strict=True))
    c = stationarity.left_side(rates, form)
    weights = stationarity.residual_weights(stationarity.squared_norms(theta), rates, c, ALPHA, weighting)
    _, v = stationarity.terms_and_direction(theta, G, weights, rates, c, ALPHA)
    S = stationarity.multiplier_scale(stationarity.squared_norms(theta), rates, c, ALPHA)
    gx, gmu = [], []
    for micro_batch in micro_batches:
        leaf, labels, mu_leaf = (
            micro_batch[0].clone().requires_grad_(),
            micro_batch[1],
            micro_batch[2].clone().requires_grad_(),
        )
        margins, part = stationarity.kkt_sum(gated(name), theta, leaf, labels, mu_leaf, keep_graph=True)
        losses = (
            0.3 * duality.feasibility(margins, labels, ALPHA, BATCH)
            + 0.7 * duality.slackness(margins, mu_leaf, ALPHA, S)
            + 0.5 * priors.box_excess(leaf, LOWER, UPPER, BATCH)
        )
        for kept, gradient in zip((gx, gmu), stationarity.cotangents(part, v, [leaf, mu_leaf], losses), strict=True):
            kept.append(gradient)
    return torch.cat(gx), torch.cat(gmu)


def test_micro_batched_cotangents_are_the_gradient_of_the_joint_graph(subtests):
    for micro_batch, name in product([1, 3, BATCH], NETS):
        with subtests.test(f"{name} {micro_batch=}"):
            for form, weighting in FORMS:
                joint, sharded = (
                    joint_gradients(name)[form, weighting],
                    sharded_gradients(name, micro_batch, form, weighting),
                )
                for expected, got in zip(joint, sharded, strict=True):
                    assert float(expected.norm()) > 1e-3
                    assert float((got - expected).norm() / expected.norm()) < 1e-10, (form, weighting)


def test_sum_without_a_graph_is_the_sum_with_it(subtests):
    for name in ("mlp3-all-leaky_relu", "cnn-max-norm", "residual", "user"):
        model, theta, _, x, mu = problem(name)
        phi = functools.partial(functional_call, model)
        x = x.clone().requires_grad_()
        with subtests.test(name):
            margins, G = stationarity.kkt_sum(phi, theta, x, LABELS, mu)
            with torch.no_grad():  # the caller's mode does not matter
                kept_margins, kept = stationarity.kkt_sum(phi, theta, x, LABELS, mu, keep_graph=True)
            assert not margins.requires_grad
            assert not any(g.requires_grad for g in G.values())
            assert kept_margins.requires_grad
            assert torch.equal(margins, kept_margins)
            assert all(torch.allclose(G[k], kept[k], rtol=1e-12, atol=1e-14) for k in G)


def test_sum_of_a_linear_classifier_by_hand():
    W, x, mu = normal(CLASSES, 5), normal(BATCH, 5, seed=1), normal(BATCH, CLASSES, seed=2).abs()
    margins, G = stationarity.kkt_sum(lambda theta, x: x @ theta["W"].T, {"W": W}, x, LABELS, mu)
    expected = torch.zeros_like(W)
    for i, j in product(range(BATCH), range(CLASSES)):
        expected[LABELS[i]] += mu[i, j] * x[i]
        expected[j] -= mu[i, j] * x[i]
        assert float(margins[i, j]) == pytest.approx(float(W[LABELS[i]] @ x[i] - W[j] @ x[i]), abs=1e-12)
    assert torch.allclose(G["W"], expected, rtol=1e-12, atol=1e-14)


RATES = {"a": 0.5, "b": 0.25, "c": 1.0, "d": 1.0}


def random_problem(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    shapes = {"a": (3, 4), "b": (4,), "c": (2, 2, 2), "d": (1,)}
    return tuple(
        {k: normal(*s, seed=start + i) for i, (k, s) in enumerate(shapes.items())} for start in (seed, seed + 50)
    )


def test_loss_without_samples_is_one(subtests):
    for weighting, form in product(options.WEIGHTINGS, ["identity", "rates"]):
        with subtests.test(f"{form} {weighting}"):
            theta, _ = random_problem(0)
            c = stationarity.left_side(RATES, form)
            weights = stationarity.residual_weights(stationarity.squared_norms(theta), RATES, c, ALPHA, weighting)
            nothing = {k: torch.zeros_like(t) for k, t in theta.items()}
            terms, _ = stationarity.terms_and_direction(theta, nothing, weights, RATES, c, ALPHA)
            assert float(sum(terms.values())) == pytest.approx(1, rel=1e-12)
            if weighting == "per_tensor":
                assert [float(t) for t in terms.values()] == pytest.approx([0.25] * 4, rel=1e-12)


def test_tensor_without_a_left_side_takes_the_relative_weight():
    theta, _ = random_problem(0)
    c = {"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0}
    relative = stationarity.residual_weights(stationarity.squared_norms(theta), RATES, c, ALPHA, "relative")
    per_tensor = stationarity.residual_weights(stationarity.squared_norms(theta), RATES, c, ALPHA, "per_tensor")
    assert per_tensor["a"] == per_tensor["b"] == relative["a"] == relative["c"]
    assert per_tensor["c"] != relative["c"]


@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0])
def test_scale_free_weights_do_not_see_how_large_what_is_before_a_normalization_was_left(factor):
    """``a`` can be scaled at will: its rate is 0, and G_a scales with the inverse."""
    theta, _ = random_problem(0)
    rates = RATES | {"a": 0.0}
    c = stationarity.left_side(rates, "rates")
    generator = torch.Generator().manual_seed(1)
    G = {k: torch.randn(t.shape, generator=generator, dtype=torch.float64) for k, t in theta.items()}

    def terms(theta, G):
        weights = stationarity.residual_weights(stationarity.squared_norms(theta), rates, c, ALPHA, "scale_free")
        return stationarity.terms_and_direction(theta, G, weights, rates, c, ALPHA)[0]

    scaled = terms(theta | {"a": factor * theta["a"]}, G | {"a": G["a"] / factor})
    torch.testing.assert_close(scaled, terms(theta, G), rtol=1e-12, atol=0)
    relative = stationarity.residual_weights(stationarity.squared_norms(theta), rates, c, ALPHA)
    own = stationarity.residual_weights(stationarity.squared_norms(theta), rates, c, ALPHA, "scale_free")
    assert {k for k in rates if own[k] == relative[k]} == {"b", "c", "d"}


def test_scale_free_weights_grow_geometrically_out_of_the_relative_ones():
    theta, _ = random_problem(0)
    squares, c = stationarity.squared_norms(theta), {"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0}

    def weights(own_scale, weighting="scale_free"):
        return stationarity.residual_weights(squares, RATES, c, ALPHA, weighting, own_scale)

    start, half, end = weights(0.0), weights(0.5), weights(1.0)
    assert start == pytest.approx(weights(1.0, "relative"), rel=1e-12)
    assert half == pytest.approx({k: math.sqrt(start[k] * end[k]) for k in start}, rel=1e-12)
    assert {k for k in start if end[k] != pytest.approx(start[k])} == {"a", "b"}


def test_left_sides_are_those_of_the_theorems():
    assert stationarity.left_side(RATES, "identity") == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert stationarity.left_side(RATES, "rates") == RATES
    assert stationarity.left_side(RATES, "top_rate") == {"a": 0, "b": 0, "c": 1, "d": 1}
    for rates, form in ((RATES, "identity"), (RATES | {"a": 0.0}, "rates")):
        assert stationarity.left_side(rates, "auto") == stationarity.left_side(rates, form)
    thirds = {"a": 1 / 3, "b": 1 - 2 / 3, "c": 0.1}  # equal up to round-off
    assert stationarity.left_side(thirds, "top_rate") == {**thirds, "c": 0}


def test_unknown_forms_and_a_zero_left_side_are_refused():
    theta, _ = random_problem(0)
    with pytest.raises(UserError, match=r"left_side='both'.*identity, rates, top_rate"):
        stationarity.left_side(RATES, "both")
    ones = dict.fromkeys(RATES, 1.0)
    with pytest.raises(UserError, match=r"weighting='both'.*relative, per_tensor, scale_free"):
        stationarity.residual_weights(stationarity.squared_norms(theta), RATES, ones, ALPHA, "both")
    zero = theta | {"c": torch.zeros(2, 2, 2), "d": torch.zeros(1)}
    with pytest.raises(UserError, match="left side of the stationarity condition is zero"):
        stationarity.residual_weights(
            stationarity.squared_norms(zero), RATES, stationarity.left_side(RATES, "top_rate"), ALPHA
        )


def test_cotangent_of_an_input_that_nothing_reaches_is_zero():
    x, mu = normal(BATCH, 5).requires_grad_(), normal(BATCH, CLASSES).requires_grad_()
    theta, apart = {"W": normal(CLASSES, 5)}, normal(2).requires_grad_()
    _, G = stationarity.kkt_sum(lambda t, x: x @ t["W"].T, theta, x, LABELS, mu, keep_graph=True)
    gx, gapart = stationarity.cotangents(G, theta, [x, apart])
    assert torch.equal(gapart, torch.zeros(2, dtype=torch.float64))
    assert float(gx.norm()) > 0


def test_parameters_that_are_never_used_have_no_cotangent():
    x, mu = normal(BATCH, 5).requires_grad_(), normal(BATCH, CLASSES).requires_grad_()
    theta = {"W": normal(CLASSES, 5), "idle": normal(2)}
    _, G = stationarity.kkt_sum(lambda t, x: x @ t["W"].T, theta, x, LABELS, mu, keep_graph=True)
    _, alone = stationarity.kkt_sum(lambda t, x: x @ t["W"].T, {"W": theta["W"]}, x, LABELS, mu, keep_graph=True)
    gx, gmu = stationarity.cotangents(G, theta, [x, mu])
    assert torch.equal(gx, stationarity.cotangents(alone, {"W": theta["W"]}, [x])[0])
    assert float(gmu.norm()) > 0
