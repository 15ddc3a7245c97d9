"""Laws of the rates: scaling psi_a, Euler's identity, the solution nearest to uniform, and who is to blame without one."""

from __future__ import annotations

import copy
import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from hpc_c2g.classifiers.models import CNN, MLP, ResidualCNN
from hpc_c2g.classifiers.rates import Rates, _feasible, _least_squares, find_rates, verify_rates
from hpc_c2g.errors import UserError


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64 in eval mode; biases, affine weights and running statistics as after training, none of them 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5)
        for name, buffer in model.named_buffers():
            noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_mean"):
                buffer.copy_(noise)
            if name.endswith("running_var"):
                buffer.copy_(0.5 + noise.abs())
    return model


class Net(nn.Module):
    """Layers by name and a forward given as a function of (self, x)."""

    def __init__(self, forward, /, **layers) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def euler_error(model: nn.Module, rates: Rates, shape: tuple[int, ...]) -> float:
    """Largest |sum_k lambda_k <theta_k, grad_k Phi_c> - Phi_c| over the classes c, relative to max |Phi|."""
    parameters = dict(model.named_parameters())
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = model(x)
    worst = 0.0
    for value in logits.sum(0):
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        total = sum(
            rates.parameters[name] * float((theta.detach() * g).sum())
            for (name, theta), g in zip(parameters.items(), gradients, strict=True)
            if g is not None
        )
        worst = max(worst, abs(total - value.item()))
    return worst / max(logits.abs().max().item(), 1e-12)  # a random net may be dead


def check(model: nn.Module, shape: tuple[int, ...]) -> Rates:
    """Every law that holds for any net with rates; those with norms that must scale have no Euler identity."""
    model = randomised(model)
    rates = find_rates(model)
    assert list(rates.parameters) == [name for name, _ in model.named_parameters()]
    assert min(rates.parameters.values()) >= 0
    assert all(rates.parameters[name] == 0 for name in rates.scale_invariant)
    assert verify_rates(model, rates, shape) < 1e-9
    if not any(rates.norm_degrees.values()):
        assert euler_error(model, rates, shape) < 1e-9
    return rates


BUILT_IN = [
    *((MLP, [6], {"depth": depth, "width": 7}) for depth in (1, 2, 3, 4)),
    *((CNN, [2, 8, 8], {"depth": 3, "width": 4, "pooling": pooling}) for pooling in ("avg", "max")),
    *((ResidualCNN, [2, 8, 8], {"depth": depth, "width": 3}) for depth in (1, 2)),
]


def test_every_built_in_classifier_scales_by_its_rates(subtests):
    for (architecture, shape, options), bias, batch_norm, activation in product(
        BUILT_IN, ("all", "first", "none"), (False, True), ("relu", "leaky_relu")
    ):
        with subtests.test(f"{architecture.__name__} {options} {bias=} {batch_norm=} {activation=}"):
            model = architecture(shape, 3, bias=bias, batch_norm=batch_norm, activation=activation, **options)
            rates = check(model, tuple(shape))
            assert rates.parameters["head.weight"] > 0
            if not batch_norm:
                assert min(rates.parameters.values()) > 0.05
                assert not rates.scale_invariant


def test_homogeneous_net_has_rate_one_over_its_depth_everywhere(subtests):
    for bias, depth, architecture in product(["first", "none"], [1, 2, 3, 4, 7], [MLP, CNN]):
        with subtests.test(f"{architecture.__name__} {depth=} {bias=}"):
            rates = find_rates(architecture([2, 8, 8], 3, width=4, depth=depth, bias=bias))
            assert set(rates.parameters.values()) == {1 / depth}  # exactly, so that equal rates compare equal


def test_with_all_biases_the_bias_of_a_layer_has_its_degree_and_weights_stay_uniform(subtests):
    for architecture in [MLP, CNN]:
        with subtests.test(architecture.__name__):
            rates = find_rates(architecture([2, 8, 8], 3, width=4, depth=4, bias="all"))
            layers = list(dict.fromkeys(name.rpartition(".")[0] for name in rates.parameters))
            for number, layer in enumerate(layers, start=1):
                assert abs(rates.parameters[f"{layer}.weight"] - 1 / 4) < 1e-12
                assert abs(rates.parameters[f"{layer}.bias"] - number / 4) < 1e-12


def test_residual_net_has_the_rates_nearest_to_uniform():
    # stem + skip + head = 1 and conv1 + conv2 = skip; the derivative of the variance vanishes at skip = 7/18
    rates = find_rates(ResidualCNN([1, 8, 8], 3, width=2, depth=1, bias="none")).parameters
    expected = {
        "stem": 11 / 36,
        "block1.conv1": 7 / 36,
        "block1.conv2": 7 / 36,
        "block1.skip": 14 / 36,
        "head": 11 / 36,
    }
    for name, value in expected.items():
        assert abs(rates[f"{name}.weight"] - value) < 1e-12


def test_the_bound_at_zero_is_active_where_uniform_would_need_a_negative_rate():
    # shared and h0..h9 have rate w, k0..k3 have 1 - w and g has 1 - 3 w, below zero at the free optimum w > 1/3
    def forward(net, x):
        hidden = net.shared(x) + sum(getattr(net, f"h{i}")(x) for i in range(10))
        return sum(getattr(net, f"k{j}")(hidden) for j in range(4)) + net.g(net.shared(net.shared(net.shared(x))))

    names = ["shared", "g", *(f"h{i}" for i in range(10)), *(f"k{j}" for j in range(4))]
    rates = check(Net(forward, **{name: nn.Linear(4, 4, bias=False) for name in names}), (4,)).parameters
    assert rates["g.weight"] == 0
    assert abs(rates["shared.weight"] - 1 / 3) < 1e-12
    assert abs(rates["k0.weight"] - 2 / 3) < 1e-12

    def spread(w):
        return torch.tensor([w] * 11 + [1 - w] * 4 + [1 - 3 * w]).var()

    assert spread(0.34) < spread(1 / 3) < spread(0.3)  # so the bound, not the objective, stops w


def test_batch_norm_leaves_rates_to_the_last_norm_and_the_head_alone():
    rates = find_rates(MLP([6], 3, depth=3, batch_norm=True, bias="all"))
    positive = {name: r for name, r in rates.parameters.items() if r}
    expected = {"norm2.weight": 0.5, "norm2.bias": 0.5, "head.weight": 0.5, "head.bias": 1.0}
    assert positive == pytest.approx(expected, abs=1e-12)
    assert rates.scale_invariant == set(rates.parameters) - set(expected)
    assert rates.norm_degrees == {"norm1": 0, "norm2": 0}
    assert set(rates.statistics) == {f"norm{i}.running_{s}" for i in (1, 2) for s in ("mean", "var")}


def test_identity_skip_around_the_last_block_after_norms_leaves_the_head_alone():
    # the stem's norm feeds a norm (degree 0) and the sum before the head, so the whole sum has degree 0
    rates = find_rates(ResidualCNN([2, 8, 8], 3, width=3, depth=1, batch_norm=True, bias="none")).parameters
    assert {name: r for name, r in rates.items() if r} == pytest.approx({"head.weight": 1.0})


def test_what_precedes_a_norm_does_not_pull_the_rates_behind_it():
    # the same tail as in the residual net above: stem, conv1, conv2, skip and head
    def forward(net, x):
        x = net.stem(net.norm(net.before2(net.before1(x))))
        return net.head(net.conv2(net.conv1(x).relu()) + net.skip(x))

    names = ["before1", "before2", "stem", "conv1", "conv2", "skip", "head"]
    layers = {name: nn.Linear(5, 5, bias=False) for name in names}
    rates = check(Net(forward, norm=nn.LayerNorm(5, elementwise_affine=False), **layers), (5,))
    expected = [0, 0, 11 / 36, 7 / 36, 7 / 36, 14 / 36, 11 / 36]
    assert [rates.parameters[f"{name}.weight"] for name in names] == pytest.approx(expected, abs=1e-12)
    assert rates.scale_invariant == {"before1.weight", "before2.weight"}


def test_a_norm_keeps_its_eps_wherever_it_can(subtests):
    for order in [1, -1]:
        with subtests.test(f"{order=}"):
            # stem + head = 1 has solutions with stem > 0, but the norm's eps would have to scale with them
            layers = {"stem": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "mix": nn.Linear(6, 6), "head": nn.Linear(6, 3)}

            def forward(net, x):
                x = net.stem(x)
                return net.head(x + net.mix(net.norm(x)))

            rates = check(Net(forward, **dict(list(layers.items())[::order])), (6,))
            assert rates.norm_degrees == {"norm": 0}
            assert {name: r for name, r in rates.parameters.items() if r} == {"head.weight": 1, "head.bias": 1}


def test_a_norm_called_twice_has_one_input_degree():
    layers = {name: nn.Linear(6, 6) for name in ("first", "second", "mix1", "mix2")}

    def forward(net, x):
        hidden = net.first(x)
        logits = net.second(hidden)
        return logits + net.mix1(net.norm(hidden)) + net.mix2(net.norm(logits))

    rates = check(Net(forward, norm=nn.BatchNorm1d(6), **layers), (6,))
    assert rates.norm_degrees == {"norm": 1}
    assert (rates.parameters["first.weight"], rates.parameters["second.weight"]) == (1, 0)


def test_least_squares_with_bounds_agrees_with_a_penalised_non_negative_solver(subtests):
    for seed in range(40):
        with subtests.test(f"{seed=}"):
            generator = np.random.default_rng(seed)
            n = int(generator.integers(3, 14))
            rows = generator.integers(-2, 3, (n // 2, n)) * (generator.random((n // 2, n)) < 0.5).astype(float)
            rows[0] = np.abs(rows[0])
            start = _feasible(rows, np.zeros(n))
            if start is None:
                continue
            b, C = np.eye(1, n // 2)[0], np.eye(n) - 1 / n
            C[:, : n // 3] = 0  # some count for nothing
            x = _least_squares(C, rows, b, start)
            assert np.abs(rows @ x - b).max() < 1e-12
            assert x.min() > -1e-12
            penalised, _ = nnls(np.vstack([1e5 * rows, C]), np.concatenate([1e5 * b, np.zeros(n)]), maxiter=10_000)
            assert np.linalg.norm(C @ x) < np.linalg.norm(C @ penalised) + 1e-6


def image_net(*layers: nn.Module, channels: int, side: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 3))


class PreActivation(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) if norm else nn.Identity() for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def dense_block(net, x):
    features = [net.stem(x)]
    for norm, conv in ((net.norm1, net.conv1), (net.norm2, net.conv2)):
        features.append(conv(norm(torch.cat(features, 1)).relu()))
    return net.head(F.adaptive_avg_pool2d(net.norm3(torch.cat(features, dim=1)), 1).flatten(1))


def functional(net, x):
    x = F.max_pool2d(F.relu(F.conv2d(x, net.kernel, net.shift, stride=2)), 2)
    x = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2).contiguous()
    x = F.dropout(F.leaky_relu(x, 0.2), training=net.training).abs() / 3
    x = 2 * x.view(x.size(0), -1)[:, : x.shape[1] * 9] - 0
    return x.clamp(min=0) @ net.matrix.T * net.gain.unsqueeze(0) + net.offset


COVERED = {
    "grouped strided convolution": (
        lambda: image_net(nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1, groups=2), channels=4, side=2),
        (2, 8, 8),
    ),
    "transposed convolution": (
        lambda: image_net(nn.ConvTranspose2d(2, 4, 2, 2), nn.ReLU(True), nn.MaxPool2d(2), channels=4, side=8),
        (2, 8, 8),
    ),
    "1-d convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(8, 3)),
        (2, 9),
    ),
    "3-d convolution": (
        lambda: nn.Sequential(nn.Conv3d(1, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)),
        (1, 4, 4, 4),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3)), (6,)),
    "layer norm without affine": (
        lambda: nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7, elementwise_affine=False), nn.Linear(7, 3)),
        (6,),
    ),
    "rms norm": (lambda: nn.Sequential(nn.Linear(6, 7), nn.RMSNorm(7), nn.Dropout(), nn.Linear(7, 3)), (6,)),
    "group norm": (lambda: image_net(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), channels=4, side=6), (2, 8, 8)),
    "instance norm": (
        lambda: image_net(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), channels=4, side=6),
        (2, 8, 8),
    ),
    "instance norm with statistics": (
        lambda: image_net(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), channels=4, side=6),
        (2, 8, 8),
    ),
    "batch norm without affine": (
        lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7, affine=False), nn.ReLU(), nn.Linear(7, 3)),
        (6,),
    ),
    "functional layer norm": (
        lambda: Net(
            lambda net, x: net.head(F.layer_norm(net.first(x), (7,), net.gain, net.shift)),
            **{"first": nn.Linear(6, 7), "head": nn.Linear(7, 3)},
            **{"gain": nn.Parameter(torch.ones(7)), "shift": nn.Parameter(torch.zeros(7))},
        ),
        (6,),
    ),
    "batch norm on the input": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 7), nn.Linear(7, 3)), (6,)),
    "anything on the raw input": (
        lambda: Net(
            lambda net, x: net.head(net.act((x - 0.5) / net.scale)),
            head=nn.Linear(6, 3),
            act=nn.Tanh(),
            scale=torch.full((6,), 2.0),
        ),
        (6,),
    ),
    "concatenation": (
        lambda: Net(
            lambda net, x: net.head(torch.cat([net.a(x).relu(), net.b2(net.b1(x))], 1)),
            **{"a": nn.Linear(6, 4), "b1": nn.Linear(6, 4), "b2": nn.Linear(4, 4), "head": nn.Linear(8, 3)},
        ),
        (6,),
    ),
    "dense net": (
        lambda: Net(
            dense_block,
            **{"stem": nn.Conv2d(2, 4, 1), "conv1": nn.Conv2d(4, 4, 1), "conv2": nn.Conv2d(8, 4, 1)},
            **{"norm1": nn.BatchNorm2d(4), "norm2": nn.BatchNorm2d(8), "norm3": nn.BatchNorm2d(12)},
            head=nn.Linear(12, 3),
        ),
        (2, 8, 8),
    ),
    "pre-activation residual": (lambda: PreActivation(norm=True), (2, 6, 6)),
    "identity skips": (lambda: PreActivation(norm=False), (2, 6, 6)),
    "functions on parameters": (
        lambda: Net(
            functional,
            **{"kernel": nn.Parameter(torch.randn(4, 2, 3, 3)), "shift": nn.Parameter(torch.randn(4))},
            **{"matrix": nn.Parameter(torch.randn(3, 36)), "gain": nn.Parameter(torch.randn(3))},
            offset=nn.Parameter(torch.randn(3)),
        ),
        (2, 8, 8),
    ),
    "the same layer twice": (
        lambda: Net(
            lambda net, x: net.head(net.core(net.core(x).relu()).relu()),
            **{"core": nn.Linear(6, 6, bias=False), "head": nn.Linear(6, 3)},
        ),
        (6,),
    ),
    "learned slope": (lambda: nn.Sequential(nn.Linear(6, 7), nn.PReLU(), nn.Linear(7, 3)), (6,)),
    "learned slope that is a factor elsewhere": (
        lambda: Net(
            lambda net, x: net.head(net.act(net.first(x)) * net.act.weight),
            **{"first": nn.Linear(6, 7), "act": nn.PReLU(), "head": nn.Linear(7, 3)},
        ),
        (6,),
    ),
    "product of two branches": (
        lambda: Net(
            lambda net, x: net.head(net.a(x) * torch.relu(net.b(x)) + net.a(x) ** 2),
            **{"a": nn.Linear(6, 4), "b": nn.Linear(6, 4), "head": nn.Linear(4, 3)},
        ),
        (6,),
    ),
    "a tensor that is never used": (
        lambda: Net(lambda net, x: net.head(x), head=nn.Linear(6, 3), idle=nn.Linear(5, 5)),
        (6,),
    ),
}


def test_net_scales_by_its_rates(subtests):
    for name in COVERED:
        with subtests.test(name):
            build, shape = COVERED[name]
            check(build(), shape)


def test_tensor_that_is_never_used_has_rate_zero():
    rates = find_rates(COVERED["a tensor that is never used"][0]()).parameters
    assert rates == {"head.weight": 1.0, "head.bias": 1.0, "idle.weight": 0.0, "idle.bias": 0.0}


def test_identity_skip_forces_the_rates_of_its_branch_to_zero():
    rates = find_rates(PreActivation(norm=False)).parameters
    assert [r for name, r in rates.items() if name.startswith("convs")] == [0, 0]
    assert rates["stem.weight"] == pytest.approx(0.5)


def test_shared_layer_is_one_variable_counted_at_each_use():
    rates = find_rates(COVERED["the same layer twice"][0]()).parameters
    assert rates == pytest.approx({"core.weight": 1 / 3, "head.weight": 1 / 3, "head.bias": 1.0}, abs=1e-12)


def test_tied_tensors_are_one_variable():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    assert check(model, (6,)).parameters == pytest.approx({"0.weight": 0.5}, abs=1e-12)


def test_a_norm_whose_input_must_scale_scales_its_eps_and_statistics_along():
    layers = {"first": nn.Linear(6, 3), "norm": nn.BatchNorm1d(3), "mix": nn.Linear(3, 3)}
    rates = check(Net(lambda net, x: net.first(x) + net.mix(net.norm(net.first(x))), **layers), (6,))
    assert rates.norm_degrees == pytest.approx({"norm": 1.0})
    assert rates.statistics == pytest.approx({"norm.running_mean": 1.0, "norm.running_var": 2.0})
    assert not rates.scale_invariant


def test_only_norms_that_must_scale_are_freed():
    layers = {"inner": nn.LayerNorm(6), "first": nn.Linear(6, 3), "norm": nn.LayerNorm(3), "mix": nn.Linear(3, 3)}

    def forward(net, x):
        logits = net.first(net.inner(x))
        return logits + net.mix(net.norm(logits))

    assert check(Net(forward, **layers), (6,)).norm_degrees == pytest.approx({"inner": 0.0, "norm": 1.0})


def test_neither_the_model_nor_its_mode_is_changed():
    model = CNN([2, 8, 8], 3, width=4, batch_norm=True)  # in training mode, float32
    before = copy.deepcopy(model.state_dict())
    assert verify_rates(model, find_rates(model), (2, 8, 8)) < 1e-9
    assert model.training
    assert model.norm1.eps == 1e-5
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


def test_frozen_parameters_have_the_rates_of_trained_ones():
    model = MLP([6], 3, depth=3, bias="all")
    assert find_rates(copy.deepcopy(model).requires_grad_(False)) == find_rates(model)


def test_optional_arguments_of_forward_keep_their_defaults():
    class Flagged(MLP):
        def forward(self, x: Tensor, features: bool = False, mask: Tensor | None = None) -> Tensor:
            if features or mask is not None:
                raise NotImplementedError
            return super().forward(x)

    assert check(Flagged([6], 3), (6,)).parameters["head.weight"] == pytest.approx(0.5)


def test_a_wrong_rate_is_detected(subtests):
    for name in ["linear1.weight", "linear2.bias", "norm2.weight", "head.bias"]:
        with subtests.test(name):
            model = randomised(MLP([6], 3, depth=3, bias="all", batch_norm=name.startswith("norm")))
            rates = find_rates(model)
            wrong = dataclasses.replace(rates, parameters=rates.parameters | {name: rates.parameters[name] + 0.1})
            assert verify_rates(model, rates, (6,)) < 1e-9
            assert verify_rates(model, wrong, (6,)) > 1e-3


def test_statistics_that_do_not_scale_are_detected():
    layers = {"first": nn.Linear(6, 3), "norm": nn.BatchNorm1d(3), "mix": nn.Linear(3, 3)}
    model = randomised(Net(lambda net, x: net.first(x) + net.mix(net.norm(net.first(x))), **layers))
    rates = find_rates(model)
    assert verify_rates(model, dataclasses.replace(rates, statistics={}), (6,)) > 1e-3
    assert verify_rates(model, dataclasses.replace(rates, norm_degrees={}), (6,)) > 1e-9


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (F.softmax(self.query(x) @ x.transpose(1, 2), -1) @ self.value(x)).mean(1)


def branch_on_values(net, x):
    return net.head(x) if x.sum() > 0 else net.head(-x)


def tied_bias(net, x):
    # the same tensor as a bias of degree 1 and on the raw input, of degree 0
    return net.head(x + net.bias) + net.bias


def small(**layers: nn.Module) -> dict:
    return {"first": nn.Linear(6, 6), "head": nn.Linear(6, 6), **layers}


BLAMED = {
    "tanh": (lambda: MLP([6], 3, activation="tanh"), ["module 'act1' (Tanh) is not homogeneous", "ReLU"]),
    "gelu": (lambda: CNN([1, 4, 4], 3, activation="gelu"), ["module 'act1' (GELU) is not homogeneous", "ReLU"]),
    "sigmoid": (
        lambda: ResidualCNN([1, 4, 4], 3, activation="sigmoid"),
        ["module 'stem_act' (Sigmoid) is not homogeneous"],
    ),
    "functional silu": (lambda: Net(lambda n, x: n.head(F.silu(n.first(x))), **small()), ["call 'silu' is not homog"]),
    "softmax at the end": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), ["module '1' (Softmax)"]),
    "softmax attention": (
        lambda: nn.Sequential(nn.Linear(4, 4), Attention()),
        ["call 'softmax' in module '1' is not homogeneous"],
    ),
    "attention module": (
        lambda: Net(lambda n, x: n.attend(x, x, x)[0], attend=nn.MultiheadAttention(6, 2)),
        ["module 'attend' (MultiheadAttention) is not homogeneous"],
    ),
    "relu6": (lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU6()), ["module '1' (ReLU6) is not homogeneous"]),
    "clamp to one": (lambda: Net(lambda n, x: n.head(x).clamp(0, 1), **small()), ["call 'clamp'", "constant 1"]),
    "quotient": (lambda: Net(lambda n, x: 1 / n.head(x), **small()), ["call 'truediv' is not known to be homogen"]),
    "write in place": (
        lambda: Net(lambda n, x: n.head(x).index_fill_(1, torch.tensor([0]), 1.0), **small()),
        ["call 'index_fill_' is not known"],
    ),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3)), nn.ReLU(), nn.Linear(3, 3)),
        ["module '0' (ParametrizedLinear) is not known"],
    ),
    "pruned": (
        lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(6, 3).requires_grad_(False), "weight", 0.5)),
        ["module '0' (Linear) is not known"],
    ),
    "constant added to the logits": (
        lambda: Net(lambda n, x: n.head(n.first(x).relu()) + 1.5, **small()),
        ["call 'add'", "the constant 1.5", "degree 1"],
    ),
    "constant padding after the head": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.ConstantPad1d(1, 2.0)),
        ["module '1' (ConstantPad1d)", "the constant 2.0"],
    ),
    "buffer added in a submodule": (
        lambda: nn.Sequential(nn.Linear(6, 3), Net(lambda n, x: x + n.shift, shift=torch.ones(3))),
        ["call 'add' in module '1'"],
    ),
    "bias that cannot match": (
        lambda: Net(tied_bias, head=nn.Linear(6, 6), bias=nn.Parameter(torch.ones(6))),
        ["call 'add'", "operands must scale alike"],
    ),
    "layer bias that cannot match": (
        lambda: Net(lambda n, x: n.head(x * n.head.bias * n.head.bias), head=nn.Linear(6, 6)),
        ["module 'head' (Linear): its bias must scale like its output", "degree 1"],
    ),
    "skip from the input to the logits": (
        lambda: Net(lambda n, x: x + n.head(n.first(x).relu()), **small()),
        ["call 'add'", "operands must scale alike", "degree 1"],
    ),
    "norm without weight at the end": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, affine=False)),
        ["module '1' (BatchNorm1d): the output must have degree 1"],
    ),
    "two outputs": (lambda: Net(lambda n, x: (n.first(x), n.head(x)), **small()), ["returns a tuple", "logits alone"]),
    "control flow": (lambda: Net(branch_on_values, **small()), ["cannot be traced", "control flow"]),
    "no parameters": (lambda: nn.Sequential(nn.Flatten()), ["no parameters"]),
}


def test_without_rates_the_message_names_the_culprit(subtests):
    for name in BLAMED:
        with subtests.test(name):
            build, fragments = BLAMED[name]
            with pytest.raises(UserError) as caught:
                find_rates(build())
            for fragment in fragments:
                assert fragment in str(caught.value)
            assert "\n" not in str(caught.value)
            assert caught.value.hint


def test_the_blame_is_minimal():
    # of many consistent biases and sums only the last one contradicts the output
    inner = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(4)]
    with pytest.raises(UserError) as caught:
        find_rates(nn.Sequential(*inner, nn.Linear(6, 6), Net(lambda n, x: x - 2, idle=nn.Identity())))
    assert caught.value.problem.count(";") == 1
    assert "call 'sub' in module '5'" in caught.value.problem


LAYERS = {
    "linear": lambda: nn.Linear(5, 5, bias=False),
    "biased": lambda: nn.Linear(5, 5),
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.3),
    "batch norm": lambda: nn.BatchNorm1d(5),
    "layer norm": lambda: nn.LayerNorm(5),
    "plain norm": lambda: nn.RMSNorm(5, elementwise_affine=False),
    "dropout": nn.Dropout,
    "skip": lambda: Net(
        lambda net, x: net.branch(x).relu() + net.skip(x), branch=nn.Linear(5, 5), skip=nn.Linear(5, 5)
    ),
    "identity skip": lambda: Net(lambda net, x: x + F.relu(net.branch(x)), branch=nn.Linear(5, 5)),
}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(sorted(LAYERS)), max_size=7), st.booleans(), st.integers(0, 1000))
def test_random_stack_with_a_linear_head_scales_by_its_rates(names, bias, seed):
    torch.manual_seed(seed)
    check(nn.Sequential(*(LAYERS[name]() for name in names), nn.Linear(5, 3, bias=bias)), (5,))
