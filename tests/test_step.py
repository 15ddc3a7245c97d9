"""Laws of a training step: independent of micro-batches, the joint gradient, nothing updated where a number is not finite."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers.trainers import ALPHA0, BATCH, GENERATORS, config, three_bundles, trainer
from torch import Tensor

from hpc_c2g.distributed.environment import LaunchEnvironment
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.kkt import alpha_control
from hpc_c2g.training.config.objective import AlphaConfig, DualityConfig, PriorConfig
from hpc_c2g.training.step.objective import Objective
from hpc_c2g.training.step.schedules import gate_width, lr_factor
from hpc_c2g.training.step.train_step import TrainStep

CLASSES = 3
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Peers(World):
    """One process to whose sums ``reduce`` does what other ranks would."""

    reduce: Callable[[list[Tensor]], None] = lambda _: None

    def sum(self, tensors: list[Tensor]) -> None:
        self.reduce(tensors)


def among(reduce: Callable[[list[Tensor]], None]) -> World:
    return Peers(LaunchEnvironment(), CPU, None, reduce)


COUNTS = (1, 2, 3)
"""Numbers of classifiers: one, or several of different kinds."""


def test_losses_do_not_depend_on_the_micro_batch(subtests):
    def check(bundles, generator):
        def curve(micro_batch: int | None) -> list[dict[str, float]]:
            step = trainer(bundles, config(micro_batch, generator))
            return [step(i).scalars for i in range(1, 6)]

        whole = curve(None)
        assert whole[-1]["loss"] != whole[0]["loss"]
        silent = ("box", "wire/bytes", "wire/seconds", "wire/hidden")  # nothing leaves the box, nor the process
        largest: dict[str, float] = {}
        for name, value in [item for scalars in whole for item in scalars.items()]:
            term = name.removeprefix(name.split("/")[0] + "/") if name.startswith("classifier") else name
            largest[term] = max(largest.get(term, 0), abs(value))
        assert min(value for term, value in largest.items() if not term.endswith(silent)) > 1e-9
        for micro_batch in (1, 4, 5):
            for got, expected in zip(curve(micro_batch), whole, strict=True):
                assert got == pytest.approx(expected, rel=1e-9, abs=1e-13)

    for count, generator in product(COUNTS, GENERATORS):
        with subtests.test(f"{count=} {generator}"):
            check(three_bundles()[:count], generator)


def joint_loss(step: TrainStep, number: int) -> tuple[Tensor, Tensor]:
    """The mean of the classifiers' losses, and the mean rho."""
    losses = [one_loss(step, k, number) for k in range(len(step.shares))]
    return tuple(torch.stack(parts).mean() for parts in zip(*losses, strict=True))


def one_loss(step: TrainStep, number_of_classifier: int, number: int) -> tuple[Tensor, Tensor]:
    """The loss of a classifier's whole batch in one graph, term by term as the method page writes it, and rho."""
    share = step.shares[number_of_classifier]
    settings, objective, alpha = step.config, share.objective, step.alpha[number_of_classifier]
    ea, rates = math.exp(alpha), objective.rates
    BATCH, CLASSES = objective.batch, objective.classes
    latents = share.sampler.batch(number, 0, BATCH)
    x, h = step.engine.module(latents)
    theta = {k: t.clone().requires_grad_() for k, t in objective.theta.items()}
    logits = objective.phi(theta, objective.widths(gate_width(number, settings.steps)), x)
    S = sum(rates[k] * math.exp(2 * alpha * rates[k]) * float((t**2).sum()) for k, t in objective.theta.items())
    pairs = [(i, j) for i in range(BATCH) for j in range(CLASSES) if j != latents.labels[i]]
    m = {(i, j): logits[i, latents.labels[i]] - logits[i, j] for i, j in pairs}
    mu = {(i, j): S / BATCH * torch.log1p(torch.exp(h[i, j])) for i, j in pairs}
    weighted = sum(mu[ij] * m[ij] for ij in pairs)
    G = torch.autograd.grad(weighted, list(theta.values()), create_graph=True)
    left = {k: ea ** rates[k] * t for k, t in objective.theta.items()}
    residual = sum((left[k] - ea ** (1 - rates[k]) * g).pow(2).sum() for k, g in zip(theta, G, strict=True))
    loss = settings.stationarity.weight * residual / sum(t.pow(2).sum() for t in left.values())
    labels = latents.labels.tolist()
    for i in range(BATCH):
        smallest = torch.stack([ea * m[i, j] for j in range(CLASSES) if j != labels[i]]).min()
        loss = loss + settings.duality.feasibility * F.relu(1 - smallest) ** 2 / BATCH
        outside = F.relu(x[i] - objective.upper) + F.relu(objective.lower - x[i])
        half = (objective.upper - objective.lower) / 2
        loss = loss + (outside / half).pow(2).sum() / BATCH
        rough = x[i].diff(dim=1).abs().mean() + x[i].diff(dim=2).abs().mean()
        loss = loss + settings.prior.total_variation * rough / BATCH
    mean, second = x.mean(0), x.square().mean(0)
    loss = loss + settings.prior.mean * mean.pow(2).sum() / second.sum()
    loss = loss + settings.prior.deviation * (second.sqrt() - 1).pow(2).mean()
    for ij in pairs:
        loss = loss + settings.duality.slackness * mu[ij] * F.relu(ea * m[ij] - 1) / S
    return loss, ea * weighted / sum(mu.values())


def test_gradient_that_reaches_the_generator_is_that_of_the_joint_loss(subtests):
    for count, generator, micro_batch in product(COUNTS, GENERATORS, [None, 5]):
        with subtests.test(f"{count=} {generator} {micro_batch=}"):
            step = trainer(three_bundles()[:count], config(micro_batch, generator))
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
    step = trainer([bundle], config(4, "free"), optimizer=torch.optim.SGD)
    with torch.no_grad():
        step.engine.module.image.mul_(20)
    expected = torch.autograd.grad(joint_loss(step, 1)[0], list(step.engine.module.parameters()))
    assert step(1).scalars["box"] > 0.1
    for got, gradient in zip(step.engine.gradients, expected, strict=True):
        assert float((got - gradient).norm()) < 1e-9 * float(gradient.norm())


def test_terms_without_weight_are_left_out(bundle):
    scalars = trainer([bundle], config(duality=DualityConfig(), prior=PriorConfig()))(1).scalars
    assert not {"slackness", "standard", "total_variation"} & set(scalars)
    assert scalars["loss"] == pytest.approx(scalars["stationarity"] * 1.3 + scalars["feasibility"] + scalars["box"])


def test_a_number_that_is_not_finite_stops_before_the_update(subtests, bundle):
    for micro_batch, (value, part) in product(
        [None, 5], [(math.nan, "image"), (math.nan, "multiplier"), (math.inf, "multiplier")]
    ):
        with subtests.test(f"{value} {part} {micro_batch=}"):
            step = trainer([bundle], config(micro_batch, "free"))
            with torch.no_grad():
                getattr(step.engine.module, part).view(-1)[1] = value
            before = copy.deepcopy(step.engine.module.state_dict())
            with pytest.raises(UserError, match=r"step 1: the term 'stationarity/\S+' is (nan|inf)") as caught:
                step(1)
            assert caught.value.hint
            assert step.engine.steps == 0
            assert step.alpha == [ALPHA0]
            after = step.engine.module.state_dict()
            assert all(torch.equal(v.nan_to_num(7), after[k].nan_to_num(7)) for k, v in before.items())


def test_the_term_at_fault_is_named(subtests, bundle):
    for term in ["feasibility", "slackness"]:
        with subtests.test(term):
            step = trainer([bundle], config(duality=DualityConfig(**{term: math.inf})))
            with pytest.raises(UserError, match=f"the term '{term}' is (inf|nan)"):
                step(1)
            assert step.engine.steps == 0


def test_a_gradient_that_is_not_finite_stops_before_the_update(bundle):
    step = trainer([bundle], config())
    step.engine.backward = lambda surrogate: (surrogate * math.inf).backward()
    with pytest.raises(UserError, match=r"the term 'gradient/generator' is (inf|nan)"):
        step(1)
    assert step.engine.steps == 0


def test_alpha_starts_on_the_high_side_of_what_the_probes_find(bundle):
    settings = config(alpha=AlphaConfig(safety_factor=1.7))
    objective = Objective(bundle, settings, BATCH, CPU, torch.float64)
    probe = alpha_control.probe_margin(bundle.model, objective.lower, objective.upper, 0)
    ascended = alpha_control.ascended_margin(bundle.model, objective.lower, objective.upper, CLASSES, 0)
    start = objective.initial_alpha()
    assert math.exp(start) * math.sqrt(probe * ascended) == pytest.approx(1.7, rel=0.05)
    assert start == Objective(bundle, settings, BATCH, CPU, torch.float64).initial_alpha()


@pytest.mark.parametrize(("start", "up"), [(ALPHA0 - 2, True), (4.0, False)])
def test_alpha_follows_the_feedback_on_rho(bundle, start, up):
    step = trainer([bundle], config(alpha=AlphaConfig(max_change=0.05)))
    step.alpha, step.alpha0 = [start], [start + 1]
    for number in (1, 2, 3):
        (alpha,), result = step.alpha, step(number)
        assert result.scalars["alpha"] == alpha
        assert step.alpha == [alpha_control.feedback(alpha, start + 1, result.scalars["rho"], 0.05)]
        assert (step.alpha[0] > alpha) == up


def test_a_step_restored_from_its_state_continues_alike(bundle):
    first, second = (trainer([bundle], config(), optimizer=torch.optim.SGD) for _ in range(2))
    first.alpha0 = [2.0]
    for number in (1, 2):
        first(number)
    second.engine.module.load_state_dict(first.engine.module.state_dict())
    assert second.state_dict() != first.state_dict()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {"alpha": first.alpha, "alpha0": [2.0], "wire": []}
    told = [{k: v for k, v in step(3).scalars.items() if k != "wire/seconds"} for step in (first, second)]
    assert told[0] == told[1]
    assert second.alpha == first.alpha


def test_every_step_sums_the_same_scalars_and_updates_once(subtests, bundle):
    def check(micro_batch):
        sizes: list[list[int]] = []
        world = among(lambda tensors: sizes.append([t.numel() for t in tensors]))
        step = trainer([bundle], config(micro_batch), world)
        step(1)
        step(2)
        gradients = [p.numel() for p in step.engine.module.parameters()]
        scalars = len(bundle.parameters) + 5 + 4  # L_stat per tensor, five terms, two sums, two norms
        moments = [2 * math.prod(bundle.input_shape)]  # E x and E x^2
        assert sizes == [moments, gradients, [scalars]] * 2
        assert step.engine.steps == 2
        assert step.engine.backwards == 2 * math.ceil(BATCH / (micro_batch or BATCH))

    for micro_batch in [None, 1, 5]:
        with subtests.test(f"{micro_batch=}"):
            check(micro_batch)


def test_summed_parts_of_two_ranks_are_what_the_loss_is_read_from(bundle):
    def double(tensors: list[Tensor]) -> None:  # another rank with the same sums
        for tensor in tensors:
            tensor.mul_(2)

    alone, both = trainer([bundle], config())(1).scalars, trainer([bundle], config(), among(double))(1).scalars
    assert both["rho"] == pytest.approx(alone["rho"], rel=1e-12)
    assert both["multiplier_sum"] == pytest.approx(2 * alone["multiplier_sum"], rel=1e-12)
    for term in ("feasibility", "slackness", "total_variation"):
        assert both[term] == pytest.approx(2 * alone[term], rel=1e-12)


def test_rate_follows_the_schedule(bundle):
    step = trainer([bundle], config())
    for number in (1, 2, 9):
        step(number)
        assert step.engine.optimizer.param_groups[0]["lr"] == 0.01 * lr_factor(number, 10)


def test_measured_margins_and_multipliers_are_those_of_the_batch(subtests):
    for count, micro_batch in product(COUNTS, [None, 5]):
        with subtests.test(f"{count=} {micro_batch=}"):
            bundles = three_bundles()[:count]
            step = trainer(bundles, config(micro_batch))
            assert step(9).sample_stats == []  # only where they are asked for
            step = trainer(bundles, config(micro_batch))
            drawn = [share.sampler.batch(1, 0, share.objective.batch) for share in step.shares]
            outputs = [[t.detach() for t in step.engine.module(latents)] for latents in drawn]
            sample_stats = step(1, watch=True).sample_stats
            assert len(sample_stats) == len(bundles)
            for bundle, latents, (x, h), band in zip(bundles, drawn, outputs, sample_stats, strict=True):
                logits = bundle.model(x)
                classes, labels = logits.shape[1], latents.labels.tolist()
                for i, y in enumerate(labels):
                    smallest = min(float(logits[i, y] - logits[i, j]) for j in range(classes) if j != y)
                    assert float(band.margins[i]) == pytest.approx(math.exp(ALPHA0) * smallest, rel=1e-5)
                expected = [F.softplus(h[i, j]).item() for i, y in enumerate(labels) for j in range(classes) if j != y]
                assert band.multipliers.flatten().tolist() == pytest.approx(expected, rel=1e-5)
                assert band.labels.tolist() == labels
                lower, upper = bundle.normalization.box()
                assert torch.allclose(band.samples, ((x - lower) / (upper - lower)).float(), atol=1e-6)
