"""Laws of the smooth gates: exact forward, sigmoid derivative, every ReLU found, the model left as it was."""

from __future__ import annotations

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from hpc_c2g.errors import UserError
from hpc_c2g.kkt.gates import GatedClassifier, GatedReLU

SLOPES = [0.0, 0.01, 0.3]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Layers in this file are initialized by torch's global generator."""
    torch.manual_seed(0)


def gate(slope: float, width: float) -> GatedReLU:
    module = GatedReLU(slope).double()
    module.width.fill_(width)
    return module


def slow_derivative(z: np.ndarray, width: float, slope: float) -> np.ndarray:
    """slope + (1 - slope) sigmoid(z / width), one number at a time."""
    return np.array([slope + (1 - slope) * (0.5 + 0.5 * math.tanh(t / width / 2)) for t in z])


class Net(nn.Module):
    """Two linear layers a, b on 5 features, any other layers by name, a forward given as a function of (self, x)."""

    def __init__(self, forward, /, **layers) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gated(model: nn.Module, x: Tensor, width: float = 1.0) -> Tensor:
    classifier = GatedClassifier(model)
    return classifier(parameters(model), dict.fromkeys(classifier.gates, torch.tensor(width, dtype=x.dtype)), x)


def test_forward_is_exactly_the_leaky_relu(subtests):
    for slope, width in product(SLOPES, [1e-6, 1.0, 1e3]):
        with subtests.test(f"{slope=} {width=}"):
            z = torch.cat(
                [inputs(100) * 10, torch.tensor([0.0, -0.0, 1e-300, -1e-300, 1e300, -1e300], dtype=torch.float64)]
            )
            assert torch.equal(gate(slope, width)(z), torch.where(z > 0, z, slope * z))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=20),
    st.floats(0.01, 10),
    st.sampled_from(SLOPES),
    st.floats(-2, 2),
)
def test_derivative_is_a_sigmoid_of_the_gates_width(values, width, slope, seed):
    z = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gate(slope, width)(z), z, torch.full_like(z, seed))
    assert gradient.numpy() == pytest.approx(
        seed * slow_derivative(np.array(values), width, slope), rel=1e-12, abs=1e-15
    )


def test_second_derivative_is_that_of_the_smooth_gate(subtests):
    for slope in SLOPES:
        with subtests.test(f"{slope=}"):
            z, width, eps = inputs(50).requires_grad_(), 0.7, 1e-5
            (first,) = torch.autograd.grad(gate(slope, width)(z).sum(), z, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), z)
            at = z.detach().numpy()
            difference = (slow_derivative(at + eps, width, slope) - slow_derivative(at - eps, width, slope)) / (2 * eps)
            assert second.numpy() == pytest.approx(difference, rel=1e-7, abs=1e-10)
            assert np.abs(difference).max() > 0.1


FORMS = {
    "module": (lambda n, x: n.b(n.act(n.a(x))), nn.ReLU(), [0.0]),
    "module in place": (lambda n, x: n.b(n.act(n.a(x))), nn.ReLU(inplace=True), [0.0]),
    "leaky module": (lambda n, x: n.b(n.act(n.a(x))), nn.LeakyReLU(0.2, inplace=True), [0.2]),
    "module in a container": (lambda n, x: n.b(n.act(n.a(x))), nn.Sequential(nn.Identity(), nn.ReLU()), [0.0]),
    "function": (lambda n, x: n.b(F.relu(n.a(x))), None, [0.0]),
    "function in place": (lambda n, x: n.b(F.relu(n.a(x), inplace=True)), None, [0.0]),
    "function with an underscore": (lambda n, x: n.b(F.relu_(n.a(x))), None, [0.0]),
    "torch function": (lambda n, x: n.b(torch.relu(n.a(x))), None, [0.0]),
    "method": (lambda n, x: n.b(n.a(x).relu()), None, [0.0]),
    "method in place": (lambda n, x: n.b(n.a(x).relu_()), None, [0.0]),
    "leaky function": (lambda n, x: n.b(F.leaky_relu(n.a(x))), None, [0.01]),
    "leaky function with a slope": (lambda n, x: n.b(F.leaky_relu(n.a(x), 0.3)), None, [0.3]),
    "leaky function with a named slope": (lambda n, x: n.b(F.leaky_relu(n.a(x), negative_slope=0.3)), None, [0.3]),
    "one module twice": (lambda n, x: n.b(n.act(n.a(n.act(n.a(x))))), nn.ReLU(), [0.0, 0.0]),
    "several forms": (
        lambda n, x: n.b(n.act(n.a(F.leaky_relu(n.a(n.a(x).relu()), 0.1)))),
        nn.ReLU(),
        [0.0, 0.1, 0.0],
    ),
    "none": (lambda n, x: n.b(n.a(x)), None, []),
}


def test_every_relu_is_replaced_in_whatever_form_it_is_called(subtests):
    for form in FORMS:
        with subtests.test(form):
            call, act, slopes = FORMS[form]
            model = Net(call, act=act).double().eval()
            classifier = GatedClassifier(model)
            assert [classifier.graph.get_submodule(name).slope for name in classifier.gates] == slopes
            assert not [m for m in classifier.graph.modules() if isinstance(m, (nn.ReLU, nn.LeakyReLU))]
            assert torch.equal(gated(model, inputs(7, 5)), model(inputs(7, 5)))


def test_a_net_with_gates_has_the_derivative_of_its_gates():
    model = Net(lambda n, x: n.b(n.act(n.a(x))), act=nn.ReLU()).double()
    x = inputs(1, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(gated(model, x, width=0.4)[0, 1], x)
    z = (model.a.weight @ x[0] + model.a.bias).detach()
    derivative = torch.from_numpy(slow_derivative(z.numpy(), 0.4, 0.0))
    assert torch.allclose(gradient[0], (model.b.weight[1] * derivative) @ model.a.weight, rtol=1e-12, atol=0)


def test_gradients_tend_to_those_of_exact_relu_as_the_width_vanishes():
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9), nn.LeakyReLU(0.2), nn.Linear(9, 3)).double()
    x = inputs(20, 5).requires_grad_()
    (exact,) = torch.autograd.grad(model(x).square().sum(), x)
    errors = []
    for width in (1.0, 0.1, 1e-8):
        (smooth,) = torch.autograd.grad(gated(model, x, width).square().sum(), x)
        errors.append(float((smooth - exact).norm() / exact.norm()))
    assert errors[0] > 0.1
    assert errors[0] > 2 * errors[1]
    assert errors[2] < 1e-12


def batch_norm_net() -> nn.Module:
    layers = nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(9, 3)
    return nn.Sequential(*layers)


def test_the_model_is_untouched():
    model = batch_norm_net()  # float32, in training mode, parameters that require gradients
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    classifier = GatedClassifier(model).to(torch.device("cpu"), torch.float64)
    theta = {k: v.double() for k, v in parameters(model).items()}
    classifier(theta, dict.fromkeys(classifier.gates, torch.ones((), dtype=torch.float64)), inputs(7, 5))
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


def test_running_statistics_are_used_frozen_and_move_with_the_dtype():
    model = batch_norm_net()
    model[1].running_mean.normal_(generator=torch.Generator().manual_seed(0))
    model[1].running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    classifier = GatedClassifier(model).to(torch.device("cpu"), torch.float64)
    theta = {k: v.double() for k, v in parameters(model).items()}
    logits = classifier(theta, dict.fromkeys(classifier.gates, torch.ones((), dtype=torch.float64)), inputs(7, 5))
    assert logits.dtype == torch.float64
    assert torch.equal(logits, copy.deepcopy(model).double().eval()(inputs(7, 5)))


def test_dropout_called_as_a_function_of_the_mode_is_off():
    model = Net(lambda n, x: n.b(F.dropout(n.a(x).relu(), 0.5, n.training))).double()
    assert torch.equal(gated(model, inputs(7, 5)), copy.deepcopy(model).eval()(inputs(7, 5)))


def test_logits_are_a_function_of_the_parameters_given():
    model = Net(lambda n, x: n.b(n.a(x).relu())).double()
    theta = {k: inputs(*v.shape, seed=3) for k, v in parameters(model).items()}
    classifier = GatedClassifier(model)
    logits = classifier(theta, {"gate0": torch.ones((), dtype=torch.float64)}, inputs(7, 5))
    assert torch.equal(logits, functional_call(model, theta, (inputs(7, 5),)))
    assert not torch.allclose(logits, model(inputs(7, 5)))


def test_pre_activation_scales_are_root_mean_squares():
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4), nn.LeakyReLU(0.2), nn.Linear(4, 3)).double()
    x = inputs(20, 5)
    with torch.no_grad():
        first = x @ model[0].weight.T + model[0].bias
        second = first.clamp(min=0) @ model[2].weight.T + model[2].bias
    classifier = GatedClassifier(model)
    scales = classifier.pre_activation_scales(parameters(model), x)
    for name, z in zip(classifier.gates, (first, second), strict=True):
        assert float(scales[name]) == pytest.approx(math.sqrt(np.mean(z.numpy() ** 2)), rel=1e-12)
    assert not [m for m in classifier.graph.modules() if m._forward_pre_hooks]


def test_a_dead_layer_has_a_positive_scale():
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    scales = GatedClassifier(model).pre_activation_scales(parameters(model), inputs(20, 5))
    assert float(scales["gate0"]) > 0


def test_control_flow_on_the_input_is_refused_in_one_line():
    with pytest.raises(UserError, match="cannot be traced") as caught:
        GatedClassifier(Net(lambda n, x: n.b(n.a(x)) if x.sum() > 0 else n.b(-n.a(x))))
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def reads_its_input_after_a_relu_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    F.relu_(y)
    return net.b(y)


def test_a_relu_in_place_is_seen_by_later_readers_of_its_input():
    model = Net(reads_its_input_after_a_relu_in_place).double()
    assert torch.equal(gated(model, inputs(7, 5)), model(inputs(7, 5)))


def test_a_relu_called_by_keyword_is_replaced():
    model = Net(lambda n, x: n.b(torch.relu(input=n.a(x)))).double()
    assert len(GatedClassifier(model).gates) == 1
    assert torch.equal(gated(model, inputs(7, 5)), model(inputs(7, 5)))


def test_parameters_that_are_never_used_do_not_matter():
    model = Net(lambda n, x: n.b(n.a(x).relu()), idle=nn.Linear(2, 2)).double()
    assert torch.equal(gated(model, inputs(7, 5)), model(inputs(7, 5)))


def test_tied_weights_act_wherever_they_are_used():
    layers = {"second": nn.Linear(5, 5), "first": nn.Linear(5, 5)}
    swapped = Net(lambda n, x: n.b(n.a(n.second(n.first(x)).relu())), **layers).double()
    swapped.second.weight = swapped.first.weight  # used first under the name that was registered last
    theta = {k: inputs(*v.shape, seed=i) for i, (k, v) in enumerate(parameters(swapped).items())}
    assert "second.weight" in theta
    assert "first.weight" not in theta
    logits = GatedClassifier(swapped)(theta, {"gate0": torch.ones((), dtype=torch.float64)}, inputs(7, 5))
    assert torch.equal(logits, functional_call(swapped, theta, (inputs(7, 5),)))
