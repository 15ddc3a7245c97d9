"""Laws of a training step: independent of micro-batches, the joint gradient, nothing updated where a number is not finite."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.distributed.environment import LaunchEnvironment
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import C2GError
from hpc_c2g.generators.latents import LatentConfig, LatentSampler
from hpc_c2g.generators.networks import FreeImagesConfig, GeneratorConfig, MLPGeneratorConfig, build_generator
from hpc_c2g.kkt import scale
from hpc_c2g.training.config import (
    DualityConfig,
    GateConfig,
    OptimiserConfig,
    PriorConfig,
    ScaleConfig,
    StationarityConfig,
    TrainConfig,
)
from hpc_c2g.training.objective import Objective
from hpc_c2g.training.schedules import gate_width, rate_factor
from hpc_c2g.training.step import TrainStep

BATCH, CLASSES, ALPHA0 = 12, 3, 0.5
CPU = torch.device("cpu")
GENERATORS = {
    "codes": MLPGeneratorConfig(codes=2, embedding=5, widths=[9], output_scale=4.0),
    "no codes": MLPGeneratorConfig(codes=0, embedding=5, widths=[9], multiplier_widths=[7], output_scale=4.0),
    "free": FreeImagesConfig(name="free", start=0.1),
}


class PlainEngine:
    """The least that a step needs: float64, autograd, an optimiser."""

    def __init__(self, module: nn.Module, optimiser: type[torch.optim.Optimizer] = torch.optim.Adam) -> None:
        self.module = module.double()
        self.optimiser = optimiser(module.parameters(), lr=0.01)
        self.backwards = self.steps = 0
        self.gradients: list[Tensor] = []

    def backward(self, surrogate: Tensor) -> None:
        self.backwards += 1
        surrogate.backward()

    def reduce(self) -> None: ...

    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters()])

    def step(self, rate_factor: float) -> None:
        self.steps += 1
        self.gradients = [p.grad.clone() for p in self.module.parameters()]
        for group in self.optimiser.param_groups:
            group["lr"] = 0.01 * rate_factor
        self.optimiser.step()
        self.optimiser.zero_grad()


def config(micro_batch: int | None = None, generator: str = "codes", **changes) -> TrainConfig:
    everything = TrainConfig(
        steps=10,
        global_batch=BATCH,
        micro_batch=micro_batch,
        generator=GENERATORS[generator],
        latents=LatentConfig(dimensions=3, bank_fraction=0.2),
        stationarity=StationarityConfig(weight=1.3),
        duality=DualityConfig(feasibility=0.3, slackness=0.2),
        prior=PriorConfig(box=1.5, total_variation=0.1, repulsion=0.4, repulsion_references=7),
        gates=GateConfig(0.5, 0.1),
    )
    return dataclasses.replace(everything, **changes)


@dataclasses.dataclass(frozen=True)
class Peers(World):
    """One process to whose sums ``reduce`` does what other ranks would."""

    reduce: Callable[[list[Tensor]], None] = lambda _: None

    def sum(self, tensors: list[Tensor]) -> None:
        self.reduce(tensors)


def trainer(
    bundle: Bundle, settings: TrainConfig, reduce: Callable[[list[Tensor]], None] = lambda _: None, **engine
) -> TrainStep:
    objective = Objective(bundle, settings, CPU, torch.float64)
    sampler = LatentSampler(settings.latents, CLASSES, BATCH, settings.steps, settings.seed)
    generator: GeneratorConfig = settings.generator
    module = build_generator(generator, 3, CLASSES, BATCH, objective.lower, objective.upper, settings.seed)
    if not isinstance(generator, FreeImagesConfig):
        with torch.no_grad():  # away from the start, where all multipliers are alike
            module.multiplier.apply(lambda m: m.weight.add_(0.3) if isinstance(m, nn.Embedding) else None)
    world = Peers(LaunchEnvironment(), CPU, None, reduce)
    return TrainStep(settings, objective, sampler, PlainEngine(module, **engine), world, ALPHA0)


@pytest.mark.parametrize("generator", GENERATORS)
def test_losses_do_not_depend_on_the_micro_batch(bundle, generator):
    def curve(micro_batch: int | None) -> list[dict[str, float]]:
        step = trainer(bundle, config(micro_batch, generator))
        return [step(i).scalars for i in range(1, 6)]

    whole = curve(None)
    assert whole[-1]["loss"] != whole[0]["loss"]
    assert min(abs(v) for scalars in whole for k, v in scalars.items() if k != "box") > 1e-9  # every term is at work
    for micro_batch in (1, 4, 5):
        for got, expected in zip(curve(micro_batch), whole, strict=True):
            assert got == pytest.approx(expected, rel=1e-9, abs=1e-13)


def joint_loss(step: TrainStep, number: int) -> tuple[Tensor, Tensor]:
    """The loss of the whole batch in one graph, term by term as the method page writes it, and rho."""
    settings, objective, alpha = step.config, step.objective, step.alpha
    ea, rates = math.exp(alpha), objective.rates
    latents = step.sampler.batch(number, 0, BATCH)
    x, h = step.engine.module(latents)
    theta = {k: t.clone().requires_grad_() for k, t in objective.theta.items()}
    logits = objective.phi(theta, objective.widths(gate_width(settings.gates, number, settings.steps)), x)
    S = sum(rates[k] * math.exp(2 * alpha * rates[k]) * float((t**2).sum()) for k, t in objective.theta.items())
    pairs = [(i, j) for i in range(BATCH) for j in range(CLASSES) if j != latents.labels[i]]
    m = {(i, j): logits[i, latents.labels[i]] - logits[i, j] for i, j in pairs}
    mu = {(i, j): S / BATCH * torch.log1p(torch.exp(h[i, j])) for i, j in pairs}
    weighted = sum(mu[ij] * m[ij] for ij in pairs)
    G = torch.autograd.grad(weighted, list(theta.values()), create_graph=True)
    left = {k: ea ** rates[k] * t for k, t in objective.theta.items()}
    residual = sum((left[k] - ea ** (1 - rates[k]) * g).pow(2).sum() for k, g in zip(theta, G, strict=True))
    loss = settings.stationarity.weight * residual / sum(t.pow(2).sum() for t in left.values())
    reference, labels = x.detach()[: settings.prior.repulsion_references], latents.labels.tolist()
    reach = settings.prior.repulsion_width * reference.flatten(1).pow(2).sum(1).mean().sqrt()
    for i in range(BATCH):
        smallest = torch.stack([ea * m[i, j] for j in range(CLASSES) if j != labels[i]]).min()
        loss = loss + settings.duality.feasibility * F.relu(1 - smallest) ** 2 / BATCH
        outside = F.relu(x[i] - objective.upper) + F.relu(objective.lower - x[i])
        half = (objective.upper - objective.lower) / 2
        loss = loss + settings.prior.box * (outside / half).pow(2).sum() / BATCH
        rough = x[i].diff(dim=1).abs().mean() + x[i].diff(dim=2).abs().mean()
        loss = loss + settings.prior.total_variation * rough / BATCH
        gaps = [(x[i] - reference[j]).flatten() for j in range(len(reference)) if labels[j] == labels[i]]
        near = [torch.exp(-(g.norm() if bool(g.any()) else g.sum() * 0) / reach) for g in gaps]
        loss = loss + settings.prior.repulsion * torch.stack(near).mean() / BATCH
    for ij in pairs:
        loss = loss + settings.duality.slackness * mu[ij] * F.relu(ea * m[ij] - 1) / S
    return loss, ea * weighted / sum(mu.values())


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("generator", GENERATORS)
def test_gradient_that_reaches_the_generator_is_that_of_the_joint_loss(bundle, generator, micro_batch):
    step = trainer(bundle, config(micro_batch, generator))
    for number in (1, 2, 3):
        loss, rho = joint_loss(step, number)
        expected = torch.autograd.grad(loss, list(step.engine.module.parameters()))
        result = step(number).scalars
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-10)
        assert result["rho"] == pytest.approx(rho.item(), rel=1e-10)
        norm = math.sqrt(sum(float(g.square().sum()) for g in expected))
        assert result["gradient/generator"] == pytest.approx(norm, rel=1e-9)
        for got, gradient in zip(step.engine.gradients, expected, strict=True):
            assert float(gradient.norm()) > 1e-8
            assert float((got - gradient).norm()) < 1e-9 * float(gradient.norm())


def test_free_images_outside_the_box_are_drawn_back(bundle):
    step = trainer(bundle, config(4, "free"), optimiser=torch.optim.SGD)
    with torch.no_grad():
        step.engine.module.image.mul_(20)
    expected = torch.autograd.grad(joint_loss(step, 1)[0], list(step.engine.module.parameters()))
    assert step(1).scalars["box"] > 0.1
    for got, gradient in zip(step.engine.gradients, expected, strict=True):
        assert float((got - gradient).norm()) < 1e-9 * float(gradient.norm())


def test_terms_without_weight_are_left_out(bundle):
    scalars = trainer(bundle, config(duality=DualityConfig(), prior=PriorConfig()))(1).scalars
    assert not {"slackness", "repulsion", "total_variation"} & set(scalars)
    assert scalars["loss"] == pytest.approx(scalars["stationarity"] * 1.3 + scalars["feasibility"] + scalars["box"])


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize(("value", "part"), [(math.nan, "image"), (math.nan, "multiplier"), (math.inf, "multiplier")])
def test_a_number_that_is_not_finite_stops_before_the_update(bundle, value, part, micro_batch):
    step = trainer(bundle, config(micro_batch, "free"))
    with torch.no_grad():
        getattr(step.engine.module, part).view(-1)[1] = value
    before = copy.deepcopy(step.engine.module.state_dict())
    with pytest.raises(C2GError, match=r"step 1: the term 'stationarity/\S+' is (nan|inf)") as caught:
        step(1)
    assert caught.value.mend
    assert step.engine.steps == 0
    assert step.alpha == ALPHA0
    after = step.engine.module.state_dict()
    assert all(torch.equal(v.nan_to_num(7), after[k].nan_to_num(7)) for k, v in before.items())


@pytest.mark.parametrize("term", ["feasibility", "slackness"])
def test_the_term_at_fault_is_named(bundle, term):
    step = trainer(bundle, config(duality=DualityConfig(**{term: math.inf})))
    with pytest.raises(C2GError, match=f"the term '{term}' is (inf|nan)"):
        step(1)
    assert step.engine.steps == 0


def test_a_gradient_that_is_not_finite_stops_before_the_update(bundle):
    step = trainer(bundle, config())
    step.engine.backward = lambda surrogate: (surrogate * math.inf).backward()
    with pytest.raises(C2GError, match=r"the term 'gradient/generator' is (inf|nan)"):
        step(1)
    assert step.engine.steps == 0


def test_alpha_starts_on_the_high_side_of_what_the_probes_find(bundle):
    settings = config(scale=ScaleConfig(caution=1.7))
    objective = Objective(bundle, settings, CPU, torch.float64)
    probe = scale.probe_margin(bundle.model, objective.lower, objective.upper, 0)
    ascended = scale.ascended_margin(bundle.model, objective.lower, objective.upper, CLASSES, 0)
    start = objective.initial_alpha()
    assert math.exp(start) * math.sqrt(probe * ascended) == pytest.approx(1.7, rel=0.05)
    assert start == Objective(bundle, settings, CPU, torch.float64).initial_alpha()


@pytest.mark.parametrize(("start", "up"), [(ALPHA0, True), (4.0, False)])
def test_alpha_follows_the_feedback_on_rho(bundle, start, up):
    step = trainer(bundle, config(scale=ScaleConfig(rate=0.05, target=1.2, gain=2.0)))
    step.alpha, step.alpha0 = start, start + 1
    for number in (1, 2, 3):
        alpha, result = step.alpha, step(number)
        assert result.scalars["alpha"] == alpha
        assert step.alpha == scale.feedback(alpha, start + 1, result.scalars["rho"], 0.05, 1.2, 2.0)
        assert (step.alpha > alpha) == up


def test_a_step_restored_from_its_state_continues_alike(bundle):
    first, second = (trainer(bundle, config(), optimiser=torch.optim.SGD) for _ in range(2))
    first.alpha0 = 2.0
    for number in (1, 2):
        first(number)
    second.engine.module.load_state_dict(first.engine.module.state_dict())
    assert second.state_dict() != first.state_dict()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {"alpha": first.alpha, "alpha0": 2.0}
    assert second(3).scalars == first(3).scalars
    assert second.alpha == first.alpha


@pytest.mark.parametrize("micro_batch", [None, 1, 5])
def test_every_step_reduces_the_same_tensors_and_updates_once(bundle, micro_batch):
    sizes: list[list[int]] = []
    step = trainer(bundle, config(micro_batch), reduce=lambda tensors: sizes.append([t.numel() for t in tensors]))
    step(1)
    step(2)
    parameters = [p.numel() for p in bundle.parameters.values()]
    assert sizes[0][: len(parameters)] == parameters
    assert sizes[:2] == sizes[2:]
    assert [len(s) for s in sizes] == [len(parameters) + 2, 7] * 2  # (G, two sums), (five terms, two norms)
    assert step.engine.steps == 2
    assert step.engine.backwards == 2 * math.ceil(BATCH / (micro_batch or BATCH))


def test_summed_parts_of_two_ranks_are_what_the_loss_is_read_from(bundle):
    def double(tensors: list[Tensor]) -> None:  # another rank with the same sums
        for tensor in tensors:
            tensor.mul_(2)

    alone, both = trainer(bundle, config())(1).scalars, trainer(bundle, config(), reduce=double)(1).scalars
    assert both["rho"] == pytest.approx(alone["rho"], rel=1e-12)
    assert both["multiplier_sum"] == pytest.approx(2 * alone["multiplier_sum"], rel=1e-12)
    for term in ("feasibility", "slackness", "total_variation", "repulsion"):
        assert both[term] == pytest.approx(2 * alone[term], rel=1e-12)


def test_rate_follows_the_schedule(bundle):
    optimiser = OptimiserConfig(warmup_fraction=0.5, final_fraction=0.1)
    step = trainer(bundle, config(optimiser=optimiser))
    for number in (1, 2, 9):
        step(number)
        assert step.engine.optimiser.param_groups[0]["lr"] == 0.01 * rate_factor(optimiser, number, 10)


def test_measured_margins_and_multipliers_are_those_of_the_batch(bundle):
    step = trainer(bundle, config())
    latents = step.sampler.batch(1, 0, BATCH)
    x, h = step.engine.module(latents)
    logits = bundle.model(x).detach()
    result = step(1)
    for i, y in enumerate(latents.labels.tolist()):
        smallest = min(float(logits[i, y] - logits[i, j]) for j in range(CLASSES) if j != y)
        assert float(result.margins[i]) == pytest.approx(math.exp(ALPHA0) * smallest, rel=1e-9)
    expected = [F.softplus(h[i, j]).item() for i in range(BATCH) for j in range(CLASSES) if j != latents.labels[i]]
    assert result.multipliers.tolist() == pytest.approx(expected, rel=1e-9)
