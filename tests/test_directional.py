"""Laws of <v, G> without G: it is <v, G>, and so are its derivatives, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_c2g.kkt.directional import directional_sum
from hpc_c2g.kkt.gates import GatedClassifier
from hpc_c2g.kkt.stationarity import cotangents, kkt_sum

CLASSES, BATCH = 3, 5


class Twice(nn.Module):
    """One weight in two linear maps and once outside of any, an output overwritten in place, a fixed bias, a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.scaled = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("fixed", torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        x.mul_(0.7).add_(0.1)
        x = x.relu()
        x = F.linear(x, self.first.weight, bias=self.fixed).relu()
        x = (x @ self.first.weight + F.linear(input=x, weight=self.scaled / 2)).relu()
        return self.head(x)


def nets() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "mlp": nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, CLASSES, bias=False)),
            "convolutions": nn.Sequential(
                nn.Conv2d(1, 4, 3, stride=2, padding=1),
                nn.LeakyReLU(0.1),
                nn.Conv2d(4, 6, 2, groups=2, dilation=1, bias=False),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(6, CLASSES),
            ),
            "normalizations": nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.GroupNorm(2, 4),
                nn.Flatten(),
                nn.LayerNorm(64),
                nn.Linear(64, CLASSES),
            ),
            "weights used twice": Twice(),
        }


@pytest.mark.parametrize("name", nets())
def test_value_and_derivatives_are_those_of_the_product_with_g(name: str) -> None:
    net = nets()[name].double().eval()
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for module in net.modules():  # frozen statistics that do something
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(random(4))
            module.running_var.copy_(1 + random(4).square())
    gated = GatedClassifier(net).to(torch.device("cpu"), torch.float64)
    theta = {k: p.detach() for k, p in net.named_parameters()}
    v = {k: random(*t.shape) for k, t in theta.items()}
    labels = torch.arange(BATCH) % CLASSES
    x = random(BATCH, 1, 4, 4).requires_grad_()
    others = labels[:, None] != torch.arange(CLASSES)
    mu = (random(BATCH, CLASSES).abs() * others).requires_grad_()
    widths = dict.fromkeys(gated.gates, torch.tensor(0.3, dtype=torch.float64))

    def phi(parameters, inputs: Tensor) -> Tensor:
        return gated(parameters, widths, inputs)

    margins, G = kkt_sum(phi, theta, x, labels, mu, keep_graph=True)
    expected = cotangents(G, v, [x, mu], margins.square().sum())
    product = sum(float((v[k] * G[k].detach()).sum()) for k in v)
    margins, value = directional_sum(phi, theta, v, x, labels, mu)
    assert float(value.detach()) == pytest.approx(product, rel=1e-12)
    got = torch.autograd.grad(value + margins.square().sum(), [x, mu])
    for mine, reference in zip(got, expected, strict=True):
        assert float(reference.norm()) > 1e-3
        assert float((mine - reference).norm()) < 1e-12 * float(reference.norm())
