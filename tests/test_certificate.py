"""The certificate against constructed KKT points and against least squares on an explicit Jacobian."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.classifiers.models import CNN, MLP
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.errors import UserError
from hpc_c2g.fitting import certificate as module
from hpc_c2g.fitting.certificate import Certificate, certify, count_equations, verdict
from hpc_c2g.fitting.gram import margin_gram
from hpc_c2g.kkt.stationarity import left_side


class Shared(nn.Module):
    """A layer called twice, two layers of one weight, a layer on sequences, functional in-place ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.one, self.other = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.sequence, self.head = nn.Linear(2, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x), inplace=True)
        h = self.other(self.one(self.twice(self.twice(h)).relu_()))
        out: Tensor = self.head(self.sequence(h.unflatten(1, (2, 2))).flatten(1))
        return out


def bundle_of(net: nn.Module, shape: tuple[int, ...], classes: int) -> Bundle:
    return Bundle(
        net.double(), {"target": "mlp"}, [str(c) for c in range(classes)], shape, Normalization.constant(shape)
    )


def data(n: int, shape: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape, dtype=torch.float64), torch.arange(n) % classes


def jacobian(net: nn.Module, x: Tensor, y: Tensor) -> tuple[list[str], list[list[Tensor]]]:
    """Names, and grad_k m_ij for every i and j != y_i, one backward pass each: the slow reference."""
    net.requires_grad_(True)
    named = dict(net.named_parameters())
    rows = []
    for i in range(len(x)):
        logits = net(x[i : i + 1])[0]
        for j in range(len(logits)):
            if j != y[i]:
                m = logits[y[i]] - logits[j]
                rows.append(list(torch.autograd.grad(m, list(named.values()), retain_graph=True)))
    net.requires_grad_(False)
    return list(named), rows


def brute_force(bundle: Bundle, x: Tensor, y: Tensor, rates: dict[str, float], c: dict[str, float], a: float) -> float:
    names, rows = jacobian(bundle.model, x, y)
    theta = bundle.parameters
    scales = [math.exp(a * (1 - rates[k])) for k in names]
    J = torch.stack([torch.cat([s * g.flatten() for s, g in zip(scales, r, strict=True)]) for r in rows])
    left = torch.cat([c[k] * math.exp(a * rates[k]) * theta[k].flatten() for k in names])
    _, norm = nnls(J.T.numpy(), left.numpy(), maxiter=10**5)
    return float(norm**2 / left.square().sum())


NETS = {
    "mlp": (lambda: MLP((6,), 3, width=9), (6,)),
    "mlp_bias": (lambda: MLP((6,), 3, width=7, depth=3, bias="all", activation="leaky_relu"), (6,)),
    "mlp_bn": (lambda: MLP((6,), 3, width=7, batch_norm=True), (6,)),
    "cnn": (lambda: CNN((1, 6, 6), 3, width=3, bias="all", pooling="max"), (1, 6, 6)),
    "shared": (Shared, (6,)),
}


def setup(name: str) -> tuple[Bundle, Tensor, Tensor]:
    """A random net in float64, twelve samples and their labels; the same in every call."""
    torch.manual_seed(3)
    make, shape = NETS[name]
    return bundle_of(make(), shape, 3), *data(12, shape, 3)


def test_constructed_kkt_point_of_a_linear_classifier() -> None:
    torch.manual_seed(0)
    x, y = data(8, (20,), 4)
    mu = torch.rand(8, 4, dtype=torch.float64) * (torch.rand(8, 4) < 0.7)
    mu[torch.arange(8), y] = 0
    net = nn.Linear(20, 4, bias=False).double()
    signs = torch.diag_embed(mu.sum(1)[:, None].expand(8, 4))[torch.arange(8), y] - mu  # dm/dlogits, weighted
    net.weight = nn.Parameter(signs.T @ x)
    result = certify(bundle_of(net, (20,), 4), x, y, {"weight": 1.0})
    assert result.relative_residual < 1e-8
    # the Jacobian has full rank (24 rows of 80, independent samples), so the multipliers are unique
    scale = math.exp(result.alpha)
    assert torch.allclose(result.multipliers, scale * mu, atol=1e-7 * float(scale * mu.max()))
    assert result.support_samples == int((mu.amax(1) > 0).sum())
    assert result.equations == 80
    assert result.unknowns == result.support_samples * (20 + 3)


def test_constructed_kkt_point_of_a_two_layer_net() -> None:
    # One neuron per class, orthonormal inputs, W = s I, V = I - 1/C and all mu equal: G_W = mu (C - 1) I = W and
    # G_V = mu C s (I - 1/C) = V hold for s^2 = 1 - 1/C.
    x, y = torch.eye(5, dtype=torch.float64), torch.arange(5)
    net = MLP((5,), 5, width=5, bias="none").double()
    centered = torch.eye(5, dtype=torch.float64) - 0.2
    net.linear1.weight = nn.Parameter(math.sqrt(0.8) * torch.eye(5, dtype=torch.float64))
    net.head.weight = nn.Parameter(centered)
    result = certify(bundle_of(net, (5,), 5), x, y, {"linear1.weight": 0.5, "head.weight": 0.5})
    assert result.relative_residual < 1e-8
    assert result.weighted_margin == pytest.approx(1, abs=1e-6)
    assert result.equations == 25
    # by Euler sum mu_ij e^a m_ij = <theta(a), theta(a)> / 2
    norm = 0.5 * math.exp(result.alpha) * (5 * 0.8 + float(centered.square().sum()))
    assert float(result.multipliers.sum()) == pytest.approx(norm, rel=1e-6)


def test_equals_brute_force(subtests: pytest.Subtests) -> None:
    for name, form in product(NETS, ["identity", "rates", "top_rate"]):
        with subtests.test(f"{name} {form}"):
            bundle, x, y = setup(name)
            rates = {k: 0.3 + 0.1 * (i % 3) for i, k in enumerate(bundle.parameters)}
            for a in (0.0, -1.3):
                result = certify(bundle, x, y, rates, form, alpha=a, statistics="frozen")
                expected = brute_force(bundle, x, y, rates, left_side(rates, form), a)
                assert result.relative_residual == pytest.approx(expected, abs=1e-8)
                assert 0 <= result.relative_residual <= 1 + 1e-12  # mu = 0 gives 1
                assert result.form == form
                assert bool((result.multipliers >= 0).all())
                assert bool((result.multipliers[torch.arange(12), y] == 0).all())


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_with_batch_statistics_equals_brute_force_in_training_mode(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    shape = (1, 4, 4)
    net = MLP(shape, 3, width=5, depth=3, batch_norm=True) if kind == "mlp" else CNN(shape, 3, 2, batch_norm=True)
    bundle, (x, y) = bundle_of(net.eval(), shape, 3), data(8, shape, 3)
    rates = {k: 0.3 + 0.1 * (i % 3) for i, k in enumerate(bundle.parameters)}
    results = [certify(bundle, x, y, rates, "rates", alpha=-0.4, statistics="batch")]
    monkeypatch.setattr(module, "CHUNK", 3)
    results.append(certify(bundle, x, y, rates, "rates", alpha=-0.4))  # coupled samples are not cut

    named, margins = dict(net.train().requires_grad_(True).named_parameters()), []
    logits = net(x)
    for i in range(8):
        margins += [logits[i, y[i]] - logits[i, j] for j in range(3) if j != y[i]]
    rows = [torch.autograd.grad(m, list(named.values()), retain_graph=True) for m in margins]
    scales = [math.exp(-0.4 * (1 - rates[k])) for k in named]
    J = torch.stack([torch.cat([s * g.flatten() for s, g in zip(scales, r, strict=True)]) for r in rows])
    left = torch.cat([rates[k] * math.exp(-0.4 * rates[k]) * t.detach().flatten() for k, t in named.items()])
    _, norm = nnls(J.T.numpy(), left.numpy(), maxiter=10**5)
    for result in results:
        assert result.relative_residual == pytest.approx(float(norm**2 / left.square().sum()), abs=1e-8)
        assert result.min_margin == pytest.approx(float(torch.stack(margins).detach().min()))
        assert result.statistics == "batch"


def test_per_tensor_parts_add_up(subtests: pytest.Subtests) -> None:
    for name in NETS:
        with subtests.test(name):
            bundle, x, y = setup(name)
            rates = {k: 0.3 + 0.1 * (i % 3) for i, k in enumerate(bundle.parameters)}
            result = certify(bundle, x, y, rates, "top_rate", alpha=-0.7)
            c = left_side(rates, "top_rate")
            own = {
                k: c[k] ** 2 * math.exp(-1.4 * rates[k]) * float(t.square().sum()) for k, t in bundle.parameters.items()
            }
            total = sum(own.values())
            assert 0.0 in own.values()
            parts = [v * (own[k] / total if own[k] > 0 else 1) for k, v in result.per_tensor.items()]
            assert sum(parts) == pytest.approx(result.relative_residual, rel=1e-9)


def test_gram_in_blocks(subtests: pytest.Subtests, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NETS:
        with subtests.test(name), monkeypatch.context() as patch:
            bundle, x, y = setup(name)
            names, rows = jacobian(bundle.model, x, y)
            scales = {k: 1 + 0.1 * i for i, k in enumerate(names)}
            J = torch.stack([torch.cat([scales[k] * g.flatten() for k, g in zip(names, r, strict=True)]) for r in rows])
            whole = margin_gram(bundle.model, scales, x, y)
            torch.testing.assert_close(whole, J @ J.T, rtol=1e-10, atol=1e-12)
            size = 4 * 8 * sum(p.numel() for p in bundle.model.parameters())
            patch.setattr(module, "CHUNK", 5)
            for memory in (1, 3 * size, 7 * size):
                torch.testing.assert_close(
                    margin_gram(bundle.model, scales, x, y, memory), whole, rtol=1e-10, atol=1e-12
                )


def test_rows_much_longer_than_along_the_left_side_do_not_end_the_search(subtests: pytest.Subtests) -> None:
    def check(length: float, known: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        J = torch.zeros(30, 40, dtype=torch.float64)
        J[:, 0] = torch.rand(30, generator=generator).double() + 0.5
        J[:, 1:4] = length * (torch.randn(30, 3, generator=generator).double() + 0.3)
        b = torch.eye(40, dtype=torch.float64)[0]
        mu = module._solve(lambda v: J @ (J.T @ v), J @ b, 1.0, J.square().sum(1) if known else None)
        assert bool((mu >= 0).all())
        _, norm = nnls(J.T.numpy(), b.numpy(), maxiter=10**5)
        assert float((b - J.T @ mu).square().sum()) == pytest.approx(norm**2, abs=1e-4 if not known else 1e-8)

    for length, known in product([1.0, 1e2, 1e4], [True, False]):
        with subtests.test(f"{length=} {known=}"):
            check(length, known)


def test_a_search_that_ends_too_soon_is_no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    bundle, (x, y) = bundle_of(MLP((6,), 3, width=9), (6,), 3), data(12, (6,), 3)

    def soon(function, start, **settings):
        return minimize(function, start, **settings | {"options": {"maxiter": 1}})

    monkeypatch.setattr(module, "minimize", soon)
    with pytest.raises(UserError, match="did not converge"):
        certify(bundle, x, y, dict.fromkeys(bundle.parameters, 0.5))


def test_chunks_of_samples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    bundle, (x, y) = bundle_of(MLP((6,), 3, width=9), (6,), 3), data(12, (6,), 3)
    rates = dict.fromkeys(bundle.parameters, 0.5)
    whole = certify(bundle, x, y, rates)
    monkeypatch.setattr(module, "CHUNK", 5)
    parts = certify(bundle, x, y, rates)
    assert parts.relative_residual == pytest.approx(whole.relative_residual, abs=1e-12)
    assert (parts.equations, parts.unknowns) == (whole.equations, whole.unknowns)


def test_scaling_a_homogeneous_net_changes_nothing() -> None:
    # fit a little, so that the margin is positive and alpha is learned from it
    torch.manual_seed(1)
    x, y = data(12, (6,), 3)
    net = MLP((6,), 3, width=30).double()
    step = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(200):
        step.zero_grad()
        F.cross_entropy(net(x), y).backward()
        step.step()
    bundle = bundle_of(net, (6,), 3)
    for rates in (
        dict.fromkeys(bundle.parameters, 0.5),
        {"linear1.weight": 0.3, "linear1.bias": 0.3, "head.weight": 0.7},
    ):
        base = certify(bundle, x, y, rates)
        assert base.min_margin > 0
        assert base.alpha == pytest.approx(-math.log(base.min_margin))
        with torch.no_grad():
            for k, p in net.named_parameters():
                p *= math.exp(2.5 * rates[k])
        scaled = certify(bundle, x, y, rates)
        assert scaled.relative_residual == pytest.approx(base.relative_residual, abs=1e-9)
        assert scaled.min_margin == pytest.approx(base.min_margin * math.exp(2.5))
        assert scaled.weighted_margin == pytest.approx(base.weighted_margin, rel=1e-6)


def test_float32_classifier_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    bundle = bundle_of(MLP((6,), 3, width=9), (6,), 3)
    bundle.model.float()
    x, y = data(12, (6,), 3)
    result = certify(bundle, x.float(), y, dict.fromkeys(bundle.parameters, 0.5))
    assert result.multipliers.dtype == torch.float64
    assert bundle.dtype == torch.float32
    assert not any(p.requires_grad or p.grad is not None for p in bundle.model.parameters())
    assert not any(m._forward_hooks for m in bundle.model.modules())


def test_equations_count_distinct_patterns() -> None:
    net = MLP((2,), 2, width=6, bias="none").double()
    x = torch.tensor([[1.0, 0.2], [0.2, 1.0], [-1.0, -0.1]], dtype=torch.float64)
    # gates over the three samples: 110 twice, 001, 100, 000, 010
    weights = [[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [1.0, -0.5], [0.0, 0.0], [-0.5, 1.0]]
    net.linear1.weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
    gates = np.array(net.act1(net.linear1(x)).detach() > 0)
    expected = len({tuple(c) for c in gates.T if 0 < c.sum() < 3})
    assert expected == 4
    assert count_equations(net, x) == 4 * 2
    net = MLP((2,), 2, width=6)
    nn.init.constant_(net.linear1.bias, 9)  # always on
    assert count_equations(net.double(), x) == 0
    assert count_equations(MLP((2,), 2, width=6, activation="tanh").double(), x) == 2 * 6 + 6
    assert count_equations(nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double(), x) == 6


def test_equations_never_exceed_the_parameters() -> None:
    torch.manual_seed(0)
    net = CNN((1, 8, 8), 3, width=2, depth=2).double()
    assert count_equations(net, data(12, (1, 8, 8), 3)[0]) == sum(p.numel() for p in net.parameters())


def test_misfits_are_named() -> None:
    bundle, (x, y) = bundle_of(MLP((6,), 3, width=9), (6,), 3), data(12, (6,), 3)
    rates = dict.fromkeys(bundle.parameters, 0.5)
    for bad_x, bad_y in ((x[:, :5], y), (x[:0], y[:0]), (x, y[:5]), (x, y[:, None]), (x, y + 1), (x, y - 1)):
        with pytest.raises(UserError, match="do not fit"):
            certify(bundle, bad_x, bad_y, rates)
    with pytest.raises(UserError, match=r"head\.weight"):
        certify(bundle, x, y, {k: r for k, r in rates.items() if k != "head.weight"})
    with pytest.raises(UserError, match="left_side"):
        certify(bundle, x, y, rates, "other")
    with pytest.raises(UserError, match="left side"):
        certify(bundle, x, y, dict.fromkeys(rates, 0.0), "rates")


def test_verdicts() -> None:
    good = Certificate(
        0.04, {"w": 0.05, "v": 0.2}, 9, 10, torch.zeros(10, 3), 300.0, 1.0, 1.07, 500, 100, "identity", -5.7
    )
    assert verdict(good).startswith("likely to work")
    assert "warning" not in verdict(good)
    for value, start in ((0.1, "doubtful"), (0.3, "doubtful"), (0.31, "unlikely to work")):
        text = verdict(dataclasses.replace(good, relative_residual=value))
        assert text.startswith(start)
        assert " v;" in text
    assert "50 equations" in verdict(dataclasses.replace(good, equations=50))
    for fault in ({"accuracy": 0.9}, {"min_margin": 0.0}):
        assert verdict(dataclasses.replace(good, **fault)).startswith("not converged")
