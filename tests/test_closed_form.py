"""Laws of the closed form: it is autograd's result for every chain, and it is taken for chains alone."""

from __future__ import annotations

import functools
import gc
import weakref
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.classifiers.models import MLP
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.errors import UserError
from hpc_c2g.kkt.closed_form import MLPClosedForm, closed_form_layers
from hpc_c2g.kkt.directional import directional_sum
from hpc_c2g.kkt.gates import GatedClassifier
from hpc_c2g.kkt.stationarity import cotangents, kkt_sum
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.step.objective import Objective, kkt_backend_name

CLASSES, BATCH, SHAPE = 4, 6, (1, 3, 3)
NETS = {
    "one map": {"depth": 1, "bias": "none"},
    "one hidden layer": {"depth": 2, "bias": "first"},
    "biases everywhere": {"depth": 3, "bias": "all"},
    "leaky": {"depth": 4, "bias": "all", "activation": "leaky_relu"},
}


class Subject:
    """A chain in float64, random samples and a random direction."""

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = MLP(SHAPE, CLASSES, width=7, **NETS[name]).double()
        self.gated = GatedClassifier(net).to(torch.device("cpu"), torch.float64)
        self.theta = {k: p.detach() for k, p in net.named_parameters()}
        self.widths = {gate: 0.2 + 0.1 * i for i, gate in enumerate(self.gated.gates)}
        links = closed_form_layers(self.gated)
        assert links is not None
        self.links, self.chain = links, MLPClosedForm(links, self.theta)
        self.labels = torch.arange(BATCH) % CLASSES
        self.x = random(BATCH, *SHAPE).requires_grad_()
        others = self.labels[:, None] != torch.arange(CLASSES)
        self.mu = (random(BATCH, CLASSES).abs() * others).requires_grad_()
        self.v = {k: random(*t.shape) for k, t in self.theta.items()}

    def phi(self, parameters, inputs: Tensor) -> Tensor:
        return self.gated(parameters, self.widths, inputs)


def test_margins_and_g_are_those_of_autograd(subtests: pytest.Subtests) -> None:
    for name, keep_graph in product(NETS, [False, True]):
        with subtests.test(f"{name} {keep_graph=}"):
            s = Subject(name)
            margins, G = s.chain.kkt_sum(s.widths, s.x, s.labels, s.mu, keep_graph)
            expected_margins, expected = kkt_sum(s.phi, s.theta, s.x, s.labels, s.mu)
            torch.testing.assert_close(margins, expected_margins, rtol=1e-12, atol=1e-13)
            assert list(G) == list(s.theta)
            torch.testing.assert_close(G, expected, rtol=1e-12, atol=1e-13)
            assert all(t.requires_grad == keep_graph for t in (margins, *G.values()))


def test_cotangents_are_those_of_autograd(subtests: pytest.Subtests) -> None:
    def check(name: str) -> None:
        s = Subject(name)

        def all_of(margins: Tensor, G: dict[str, Tensor]) -> list[Tensor]:
            return cotangents(G, s.v, [s.x, s.mu], (margins - 1).relu().square().sum() + s.x.square().sum())

        got = all_of(*s.chain.kkt_sum(s.widths, s.x, s.labels, s.mu, keep_graph=True))
        torch.testing.assert_close(
            got, all_of(*kkt_sum(s.phi, s.theta, s.x, s.labels, s.mu, keep_graph=True)), rtol=1e-11, atol=1e-12
        )

    for name in NETS:
        with subtests.test(name):
            check(name)


def test_the_product_with_a_direction_and_its_cotangents_are_those_of_autograd(subtests: pytest.Subtests) -> None:
    def check(name: str, factor: float) -> None:
        s = Subject(name)

        def value_and_cotangents(margins: Tensor, product: Tensor) -> list[Tensor]:
            total = factor * product + margins.square().sum()
            return [product.detach(), *torch.autograd.grad(total, [s.x, s.mu])]

        got = value_and_cotangents(*s.chain.directional_sum(s.widths, s.v, s.x, s.labels, s.mu))
        expected = value_and_cotangents(*directional_sum(s.phi, s.theta, s.v, s.x, s.labels, s.mu))
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)

    for name, factor in product(NETS, [1.0, -2.5, 0.0]):
        with subtests.test(f"{name} {factor=}"):
            check(name, factor)


def test_a_result_that_is_left_out_has_no_cotangents() -> None:
    s = Subject("biases everywhere")
    margins, _ = s.chain.directional_sum(s.widths, s.v, s.x, s.labels, s.mu)
    got = torch.autograd.grad(margins.sum(), [s.x, s.mu])
    assert not got[1].any()
    expected = torch.autograd.grad(kkt_sum(s.phi, s.theta, s.x, s.labels, s.mu, keep_graph=True)[0].sum(), s.x)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-11, atol=1e-12)
    v = {"linear2.weight": s.v["linear2.weight"]}
    got = cotangents(s.chain.kkt_sum(s.widths, s.x, s.labels, s.mu, keep_graph=True)[1], v, [s.x, s.mu])
    expected = cotangents(kkt_sum(s.phi, s.theta, s.x, s.labels, s.mu, keep_graph=True)[1], v, [s.x, s.mu])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_each_tensor_is_told_of_once_the_last_map_first(keep_graph: bool) -> None:
    s, told = Subject("biases everywhere"), []
    _, G = s.chain.kkt_sum(s.widths, s.x, s.labels, s.mu, keep_graph, lambda name, part: told.append((name, part)))
    assert [name for name, _ in told] == [
        f"{module}.{kind}" for module in ("head", "linear2", "linear1") for kind in ("weight", "bias")
    ]
    assert all(torch.equal(part, G[name]) for name, part in told)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head((x + self.second(self.first(x).relu())).relu())


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(9, 9), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(self.first(x.flatten(1)).relu()).relu())


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    net[3].weight = net[1].weight
    return net


def frozen_part() -> nn.Module:
    """A map whose weight is a buffer, which theta does not name."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    weight = net[1].weight.detach()
    del net[1].weight
    net[1].register_buffer("weight", weight)
    return net


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    net[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return net


OTHERS = {
    "convolutions": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, CLASSES)),
    "batch norm": lambda: MLP(SHAPE, CLASSES, width=7, depth=3, batch_norm=True),
    "a skip connection": Skip,
    "a map called twice": Again,
    "tied weights": tied,
    "a map of its own kind": lambda: nn.Sequential(nn.Flatten(), Scaled(9, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
    "two maps in a row": lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 9), nn.Linear(9, CLASSES)),
    "another activation": lambda: MLP(SHAPE, CLASSES, width=7, activation="tanh"),
    "a rectifier at the end": lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, CLASSES), nn.ReLU()),
    "a part that is flattened": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, CLASSES)),
    "a fixed weight": frozen_part,
    "a hook": hooked,
    "a gate without a bend": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(9, 9), nn.LeakyReLU(1.0), nn.Linear(9, CLASSES)
    ),
}


def test_nothing_else_is_taken_for_a_chain(subtests: pytest.Subtests) -> None:
    for name, make in OTHERS.items():
        with subtests.test(name):
            assert closed_form_layers(GatedClassifier(make())) is None


def test_what_does_nothing_is_no_link() -> None:
    net = nn.Sequential(
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(9, 5), nn.Identity(), nn.ReLU(), nn.Dropout(), nn.Linear(5, CLASSES)
    )
    links = closed_form_layers(GatedClassifier(net))
    assert links is not None
    assert [link.weight for link in links] == ["2.weight", "6.weight"]


class Flattened(nn.Module):
    def __init__(self, flatten) -> None:
        super().__init__()
        self.flatten, self.head = flatten, nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(x))


FLATTENINGS = [
    lambda x: x.flatten(1),
    lambda x: x.flatten(start_dim=1),
    lambda x: torch.flatten(x, 1, -1),
    lambda x: torch.flatten(x, start_dim=1, end_dim=-1),
]


def test_every_way_to_flatten_samples_is_one(subtests: pytest.Subtests) -> None:
    for i, flatten in enumerate(FLATTENINGS):
        with subtests.test(f"way {i}"):
            assert closed_form_layers(GatedClassifier(Flattened(flatten))) is not None


def test_nothing_but_samples_is_flattened() -> None:
    assert closed_form_layers(GatedClassifier(Flattened(torch.flatten))) is None
    assert closed_form_layers(GatedClassifier(Flattened(lambda x: x.flatten(1, 2)))) is None


def test_a_weight_that_the_bundle_knows_by_another_name_goes_through_autograd() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare, self.first, self.head = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, CLASSES)
            self.spare.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x.flatten(1)).relu())

    assert objective_of(Spare().double()).chain is None


@pytest.mark.parametrize("kept", ["G", "product"])
def test_a_graph_lets_go_of_activations_and_says_so(kept: str) -> None:
    s = Subject("biases everywhere")
    if kept == "G":
        margins, _ = s.chain.kkt_sum(s.widths, s.x, s.labels, s.mu, keep_graph=True)
    else:
        margins, _ = s.chain.directional_sum(s.widths, s.v, s.x, s.labels, s.mu)
    torch.autograd.grad(margins.sum(), s.x, retain_graph=True)
    with pytest.raises(RuntimeError, match="evaluate the sum again"):
        torch.autograd.grad(margins.sum(), s.x)


@pytest.mark.parametrize("keep", ["kkt_sum", "directional_sum"])
def test_a_graph_that_nobody_differentiates_is_freed(keep: str) -> None:
    s, alive = Subject("biases everywhere"), []
    arguments = (s.widths, *([s.v] if keep == "directional_sum" else []), s.x, s.labels, s.mu)
    out = getattr(s.chain, keep)(*arguments, **({"keep_graph": True} if keep == "kkt_sum" else {}))
    alive.append(weakref.ref(out[0].grad_fn.saved[0]))
    gc.disable()
    try:
        del out
        assert alive[0]() is None
    finally:
        gc.enable()


def test_bfloat16_rounds_the_sides_of_products_and_sums_in_float32() -> None:
    s = Subject("one map")
    theta = {k: t.float() for k, t in s.theta.items()}
    x, mu = s.x.detach().float(), s.mu.detach().float()
    low = MLPClosedForm(s.links, theta, "bfloat16")
    margins, G = low.kkt_sum(s.widths, x, s.labels, mu)
    rounded, weight = x.flatten(1).bfloat16().float(), theta["head.weight"].bfloat16().float()
    logits = rounded @ weight.T
    torch.testing.assert_close(margins, logits.gather(1, s.labels[:, None]) - logits)
    delta = -mu
    delta[range(BATCH), s.labels] += mu.sum(1)
    torch.testing.assert_close(G["head.weight"], delta.bfloat16().float().T @ rounded)
    assert G["head.weight"].dtype == torch.float32


def test_bfloat16_is_near_float32(subtests: pytest.Subtests) -> None:
    for name in NETS:
        with subtests.test(name):
            s = Subject(name)
            theta = {k: t.float() for k, t in s.theta.items()}
            v = {k: t.float() for k, t in s.v.items()}
            x, mu = (t.detach().float().requires_grad_() for t in (s.x, s.mu))
            got, expected = (
                cotangents(chain.kkt_sum(s.widths, x, s.labels, mu, keep_graph=True)[1], v, [x, mu])
                for chain in (MLPClosedForm(s.links, theta, "bfloat16"), MLPClosedForm(s.links, theta))
            )
            for a, b in zip(got, expected, strict=True):
                assert 0 < float((a - b).norm() / b.norm()) < 0.03


def objective_of(net: nn.Module, **settings: str) -> Objective:
    names = [str(c) for c in range(CLASSES)]
    bundle = Bundle(net, {"target": "mlp"}, names, SHAPE, Normalization.constant(SHAPE, mean=0.5))
    config = TrainConfig(classifier="c", run_dir="r", **settings)
    return Objective(bundle, config, BATCH, torch.device("cpu"), torch.float64)


def test_fast_off_goes_through_autograd_to_the_same_result() -> None:
    s = Subject("biases everywhere")
    net = MLP(SHAPE, CLASSES, width=7, **NETS["biases everywhere"]).double()
    fast, slow = objective_of(net), objective_of(net, kkt_backend="autograd")
    assert fast.chain is not None
    assert slow.chain is None
    torch.testing.assert_close(
        fast.kkt_backend(0.1).kkt_sum(s.x, s.labels, s.mu),
        slow.kkt_backend(0.1).kkt_sum(s.x, s.labels, s.mu),
        rtol=1e-11,
        atol=1e-12,
    )


def test_a_run_tells_which_way_it_goes() -> None:
    def way(net: nn.Module, **settings: str) -> str:
        names = [str(c) for c in range(CLASSES)]
        bundle = Bundle(net, {"target": "mlp"}, names, SHAPE, Normalization.constant(SHAPE, mean=0.5))
        return kkt_backend_name(bundle, TrainConfig(classifier="c", run_dir="r", **settings))

    assert way(MLP(SHAPE, CLASSES, width=7)) == "closed form, products in float32"
    assert way(MLP(SHAPE, CLASSES, width=7), matmul_precision="bfloat16") == "closed form, products in bfloat16"
    assert way(MLP(SHAPE, CLASSES, width=7), kkt_backend="autograd") == "autograd (as configured)"
    assert way(OTHERS["convolutions"]()) == "autograd"
    normed = MLP(SHAPE, CLASSES, width=7, batch_norm=True)
    assert way(normed) == "autograd"


@pytest.mark.parametrize(
    ("make", "settings", "hint"),
    [
        (OTHERS["convolutions"], {}, "give matmul_precision=float32"),
        (functools.partial(MLP, SHAPE, CLASSES, width=7), {"kkt_backend": "autograd"}, "kkt_backend=auto"),
    ],
)
def test_low_precision_without_the_fast_path_is_refused(make, settings: dict[str, str], hint: str) -> None:
    with pytest.raises(UserError, match="matmul_precision=bfloat16 needs the closed form") as error:
        objective_of(make().double(), matmul_precision="bfloat16", **settings)
    assert hint in str(error.value)
