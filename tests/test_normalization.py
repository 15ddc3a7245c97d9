"""Laws of batch statistics: the KKT sum and what reaches the generator are those of the classifier's own training mode."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.trainers import NORMED, SHAPE, config, normed, trainer
from torch import Tensor, nn

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.kkt import stationarity
from hpc_c2g.kkt.gates import GatedClassifier
from hpc_c2g.kkt.margins import other_classes, pairwise_margins, smallest_margins
from hpc_c2g.kkt.normalization import BatchStatistics
from hpc_c2g.kkt.priors import statistics_distance
from hpc_c2g.training.config.objective import DualityConfig, PriorConfig, StationarityConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.step.schedules import gate_width

BATCH = 13


def settings(generator: str, **changes: object) -> TrainConfig:
    everything = {
        "global_batch": BATCH,
        "prior": PriorConfig(statistics=0.7),
        "duality": DualityConfig(feasibility=0.3, slackness=0.2),
    }
    return config(None, generator, **{**everything, **changes})


def problem(bundle: Bundle) -> tuple[Tensor, Tensor, Tensor]:
    """x, labels, mu."""
    generator = torch.Generator().manual_seed(2)
    x = 1.5 * torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64) + 0.3
    labels, classes = torch.arange(BATCH) % len(bundle.classes), len(bundle.classes)
    mu = torch.rand(BATCH, classes, generator=generator, dtype=torch.float64) * other_classes(labels, classes)
    return x, labels, mu


@pytest.mark.parametrize("kind", NORMED)
def test_kkt_sum_is_the_gradient_of_the_model_in_training_mode(kind):
    bundle = normed(kind)
    x, labels, mu = problem(bundle)
    phi, statistics = GatedClassifier(bundle.model), BatchStatistics()
    buffers = {k: b.clone() for k, b in bundle.model.named_buffers()}
    sharp = dict.fromkeys(phi.gates, torch.tensor(1e-12, dtype=torch.float64))
    margins, G = stationarity.kkt_sum(
        lambda theta, z: phi(theta, sharp, z, statistics), bundle.parameters, x, labels, mu
    )
    assert all(torch.equal(b, buffers[k]) for k, b in bundle.model.named_buffers())

    model = copy.deepcopy(bundle.model).train().requires_grad_(True)
    called: list[tuple[nn.Module, int]] = []
    for norm in (m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))):
        norm.momentum = 1.0
        norm.register_forward_pre_hook(lambda n, args: called.append((n, args[0].numel() // args[0].shape[1])))
    expected = pairwise_margins(model(x), labels)
    torch.testing.assert_close(margins, expected.detach(), rtol=1e-10, atol=1e-10)
    named = dict(model.named_parameters())
    for k, g in zip(named, torch.autograd.grad((mu * expected).sum(), list(named.values())), strict=True):
        torch.testing.assert_close(G[k], g, rtol=1e-9, atol=1e-10)
    for moments, (norm, count) in zip(statistics.moments, called, strict=True):
        torch.testing.assert_close(moments.mean.detach(), norm.running_mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moments.variance.detach() * count / (count - 1), norm.running_var)


def test_without_batch_statistics_a_norm_is_that_of_eval_mode_bit_for_bit():
    bundle = normed("cnn")
    x, _, _ = problem(bundle)
    phi = GatedClassifier(bundle.model)
    widths = dict.fromkeys(phi.gates, 1.0)
    assert torch.equal(phi(bundle.parameters, widths, x), bundle.model(x))
    coupled = phi(bundle.parameters, widths, x, BatchStatistics())
    assert not torch.allclose(coupled, bundle.model(x))
    assert torch.equal(phi(bundle.parameters, widths, x), bundle.model(x))  # nothing stays


@pytest.mark.parametrize("affine", [True, False])
def test_cotangents_are_finite_differences_where_the_net_is_smooth(affine):
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(4, affine=affine, momentum=None), nn.BatchNorm1d(5, affine=affine)]
    net = nn.Sequential(nn.Linear(3, 4), norms[0], nn.Linear(4, 5), norms[1], nn.Linear(5, 2)).double()
    phi, labels = GatedClassifier(net.eval()), torch.tensor([0, 1, 0, 1, 1])
    theta = {k: p.detach() for k, p in net.named_parameters()}
    x, mu = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.rand(5, 2, dtype=torch.float64)
    v = {k: torch.randn_like(t) for k, t in theta.items()}

    def product(samples: Tensor, multipliers: Tensor) -> Tensor:
        def classify(parameters: dict[str, Tensor], z: Tensor) -> Tensor:
            return phi(parameters, {}, z, BatchStatistics())

        _, G = stationarity.kkt_sum(classify, theta, samples, labels, multipliers, keep_graph=True)
        return torch.stack([(v[k] * g).sum() for k, g in G.items()]).sum()

    assert torch.autograd.gradcheck(product, (x, mu.requires_grad_()), eps=1e-6, atol=1e-6)


class Smooth(nn.Module):
    """The value of a ReLU with the derivatives of width log(1 + e^(z / width))."""

    def __init__(self, width: Tensor) -> None:
        super().__init__()
        self.width = width

    def forward(self, z: Tensor) -> Tensor:
        smooth = self.width * torch.logaddexp(z / self.width, torch.zeros_like(z))
        return smooth + (F.relu(z) - smooth).detach()


def test_a_shift_of_all_samples_is_invisible_without_the_prior():
    bundle = normed()
    x, labels, mu = problem(bundle)
    phi, shift = GatedClassifier(bundle.model), torch.linspace(-3, 3, 16, dtype=torch.float64).view(SHAPE)
    widths = dict.fromkeys(phi.gates, 1.0)
    found = []
    for samples in (x, x + shift):
        batch = BatchStatistics()

        def classify(theta: dict[str, Tensor], z: Tensor, batch: BatchStatistics = batch) -> Tensor:
            return phi(theta, widths, z, batch)

        G = stationarity.kkt_sum(classify, bundle.parameters, samples, labels, mu)[1]
        found.append((G, statistics_distance(batch.moments)))
    (G, distance), (moved, further) = found
    for k, g in G.items():
        torch.testing.assert_close(moved[k], g, rtol=1e-9, atol=1e-9)
    assert abs(float((further - distance).detach())) > 0.1


def joint_loss(step, bundle: Bundle, number: int) -> Tensor:
    """The loss of step ``number`` in one graph of the classifier's own training mode, term by term as the method page writes it."""
    (share,), run, alpha = step.shares, step.config, step.alpha[0]
    objective, rates, ea = share.objective, share.objective.rates, math.exp(step.alpha[0])
    latents = share.sampler.batch(number, 0, BATCH)
    x, h = step.engine.module(latents)
    model = copy.deepcopy(bundle.model).train().requires_grad_(True)
    widths = iter(objective.widths(gate_width(number, run.steps)).values())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Smooth(next(widths)))
    seen: list[tuple[nn.Module, Tensor]] = []
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.register_forward_pre_hook(lambda norm, args: seen.append((norm, args[0])))
    running = {
        n: (m.running_mean.clone(), m.running_var.clone()) for n, m in model.named_modules() if hasattr(m, "eps")
    }
    names = {m: n for n, m in model.named_modules()}
    theta = dict(model.named_parameters())
    logits = model(x)
    c = {k: rates[k] for k in theta}
    S = sum(rates[k] * c[k] * ea ** (2 * rates[k]) * float(theta[k].detach().square().sum()) for k in theta)
    y = latents.labels
    m = logits.gather(1, y[:, None]) - logits
    mu = S / BATCH * F.softplus(h) * F.one_hot(y, logits.shape[1]).logical_not()
    G = torch.autograd.grad((mu * m).sum(), list(theta.values()), create_graph=True)
    left = {k: c[k] * ea ** rates[k] * t.detach() for k, t in theta.items()}
    whole = sum(t.square().sum() for t in left.values())
    residual = 0.0
    for k, g in zip(theta, G, strict=True):
        square = (left[k] - ea ** (1 - rates[k]) * g).square().sum() / whole
        if not c[k]:  # on the way to its own scale
            own = (ea ** rates[k] * theta[k].detach()).square().sum() / whole
            square = square * own ** min(1, (number - 1) / (0.6 * run.steps))
        residual = residual + square
    loss = run.stationarity.weight * residual
    loss = loss + 0.3 / BATCH * F.relu(1 - ea * smallest_margins(m, y)).square().sum()
    loss = loss + 0.2 / S * (mu * F.relu(ea * m - 1)).sum()
    outside = F.relu(x - objective.upper) + F.relu(objective.lower - x)
    loss = loss + 1.5 / BATCH * (outside / ((objective.upper - objective.lower) / 2)).square().sum()
    layers = []
    for norm, z in seen:
        channels = z.transpose(0, 1).flatten(1)
        mean, variance = running[names[norm]]
        std = (variance + norm.eps).sqrt()
        spread = (channels.var(1, correction=0) + norm.eps).sqrt()
        layers.append((((channels.mean(1) - mean) / std) ** 2 + (spread / std - 1) ** 2).mean())
    assert alpha == step.alpha[0]
    return loss + 0.7 * torch.stack(layers).mean()


@pytest.mark.parametrize("number", [1, 3, 8])
@pytest.mark.parametrize(("kind", "generator"), [("mlp", "codes"), ("cnn", "free"), ("residual", "free")])
def test_gradient_that_reaches_the_generator_is_that_of_one_graph_in_training_mode(kind, generator, number):
    bundle = normed(kind)
    run = settings(generator, stationarity=StationarityConfig(weight=1.3))
    step = trainer([bundle], run)
    loss = joint_loss(step, bundle, number)
    expected = torch.autograd.grad(loss, list(step.engine.module.parameters()))
    assert step(number).scalars["loss"] == pytest.approx(loss.item(), rel=1e-9)
    for got, gradient in zip(step.engine.gradients, expected, strict=True):
        assert float(gradient.norm()) > 1e-8
        assert float((got - gradient).norm()) < 1e-8 * float(gradient.norm())
