"""Laws of training with batch statistics: the same on two ranks and in micro-batches; what cannot be exact is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.ranks import run_ranks
from helpers.trainers import config, normed, three_bundles, trainer
from torch import Tensor, nn

from hpc_c2g.bound.config import BoundConfig
from hpc_c2g.bound.sampling_error import sampling_error
from hpc_c2g.classifiers.bundle import Bundle, save_bundle
from hpc_c2g.distributed.adjoint import adjoint_sum
from hpc_c2g.distributed.environment import LaunchEnvironment
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.config.objective import AlphaConfig, DualityConfig, PriorConfig, StationarityConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.cost.dry_run import DryRun
from hpc_c2g.training.loop import train
from hpc_c2g.training.step.objective import Objective

BATCH = 13  # an odd batch, which two ranks share unevenly


def settings(generator: str = "free", **changes: object) -> TrainConfig:
    everything = {
        "global_batch": BATCH,
        "prior": PriorConfig(statistics=0.7),
        "duality": DualityConfig(feasibility=0.3, slackness=0.2),
    }
    return config(None, generator, **{**everything, **changes})


@pytest.mark.parametrize(
    ("kind", "generator", "micro_batch"), [("mlp", "codes", 5), ("cnn", "free", 1), ("residual", "free", 6)]
)
def test_micro_batches_take_the_steps_of_one_graph(kind, generator, micro_batch):
    runs = []
    for size in (None, micro_batch):
        step = trainer([normed(kind)], dataclasses.replace(settings(generator), micro_batch=size))
        told = [{k: v for k, v in step(n).scalars.items() if not k.startswith("wire/")} for n in (1, 2)]
        runs.append((told, step.engine.gradients))
    (one, gradients), (several, parts) = runs
    for got, expected in zip(several, one, strict=True):
        assert got == pytest.approx(expected, rel=1e-8, abs=1e-12)
    for got, expected in zip(parts, gradients, strict=True):
        assert float((got - expected).norm()) < 1e-8 * float(expected.norm())


def test_micro_batches_save_memory():
    dry = DryRun(normed(width=40), TrainConfig(global_batch=400))
    assert dry.working_bytes(20) < dry.working_bytes(400, one_pass=True) / 4


def classifiers(name: str) -> list[Bundle]:
    plain = three_bundles()[1]
    return {
        "norm": [normed()],
        "micro-batches": [normed("cnn")],
        "residual": [normed("residual")],
        "norm and plain": [normed("cnn"), plain],
    }[name]


RANKED = {
    "norm": settings("codes"),
    "residual": settings(),
    "micro-batches": dataclasses.replace(settings("codes"), micro_batch=3),
    "norm and plain": settings(global_batch=25, distributed=dataclasses.replace(config().distributed, groups=1)),
}


def measured(world: World | None, name: str) -> dict:
    step = trainer(classifiers(name), RANKED[name], world)
    told = [{k: v for k, v in step(n).scalars.items() if not k.startswith("wire/")} for n in (1, 2, 3)]
    return {"scalars": told, "alpha": step.alpha, "gradients": step.engine.gradients}


def on_ranks(world: World, run: TrainConfig) -> dict:
    torch.set_num_threads(1)
    total = adjoint_sum(Mesh.over(world, 1))
    x = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def curved(t: Tensor) -> Tensor:  # the same on every rank, so that both move together
        return (total(t.sin()) * t).exp()

    checks = [torch.autograd.gradcheck(total, x), torch.autograd.gradgradcheck(total, x)]
    checks += [torch.autograd.gradcheck(curved, x), torch.autograd.gradgradcheck(curved, x)]
    train(run, world)
    return {"checks": checks, **{name: measured(world, name) for name in RANKED}}


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> TrainConfig:
    """A run on a classifier with BatchNorm, pilot and all."""
    folder = tmp_path_factory.mktemp("normed")
    save_bundle(normed(), folder / "classifier")
    return TrainConfig(
        classifier=str(folder / "classifier"),
        run_dir=str(folder / "one"),
        steps=4,
        global_batch=BATCH,
        micro_batch="auto",
        device="cpu",
        alpha=AlphaConfig(pilot_steps=3),
        prior=PriorConfig(statistics=0.5),
        log=LogConfig(every=1, progress=False),
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, short) -> list[dict]:
    run = dataclasses.replace(short, run_dir=short.run_dir.replace("one", "two"), micro_batch=None)
    results = run_ranks(2, tmp_path_factory.mktemp("meetings"), on_ranks, run, seconds=60)
    assert [kind for kind, _ in results] == ["value"] * 2, results
    return [value for _, value in results]


def test_the_sum_over_ranks_has_right_first_and_second_derivatives(two_ranks):
    assert [r["checks"] for r in two_ranks] == [[True] * 4] * 2


@pytest.mark.parametrize("name", RANKED)
def test_two_ranks_take_the_steps_of_one(two_ranks, name):
    one = measured(None, name)
    assert any(value > 1e-3 for key, value in one["scalars"][0].items() if key.endswith("statistics"))
    for found in (r[name] for r in two_ranks):
        for got, expected in zip(found["scalars"], one["scalars"], strict=True):
            assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert found["alpha"] == pytest.approx(one["alpha"], rel=1e-12)
        for got, gradient in zip(found["gradients"], one["gradients"], strict=True):
            torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-12)


def test_a_run_with_automatic_micro_batch_takes_its_whole_share_on_one_rank_and_on_two(two_ranks, short):
    train(short)
    read = [Path(short.run_dir.replace("one", n), "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    for one, two in zip(*read, strict=True):
        a, b = json.loads(one), json.loads(two)
        for key in ("loss", "stationarity", "statistics", "alpha", "rho"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
    with pytest.raises(UserError, match=r"run_dir=\S+ has stationarity\.statistics=auto .*BatchNorm") as caught:
        sampling_error(BoundConfig(run_dir=short.run_dir, batches=[8], reference_batch=64, repeats=2))
    assert "stationarity.statistics=frozen" in caught.value.hint


def test_a_net_without_norms_does_not_ask_for_statistics():
    bundle = three_bundles()[0]
    runs = []
    for choice in ("auto", "batch", "frozen"):
        chosen = StationarityConfig(statistics=choice)
        step = trainer([bundle], config(5, stationarity=chosen))
        runs.append([{k: v for k, v in step(n).scalars.items() if "wire" not in k} for n in (1, 2)])
        assert not step.coupled
    assert runs[0] == runs[1] == runs[2]


def test_frozen_statistics_leave_the_samples_uncoupled():
    chosen = StationarityConfig(statistics="frozen")
    whole, micro_batches = (
        trainer([normed()], config(size, stationarity=chosen))(1).scalars["loss"] for size in (None, 5)
    )
    assert micro_batches == pytest.approx(whole, rel=1e-9)
    assert trainer([normed()], config())(1).scalars["loss"] != pytest.approx(whole, rel=1e-3)


def untracked() -> Bundle:
    bundle = normed()
    bundle.model.norm1.track_running_stats = False
    bundle.model.norm1.running_mean = bundle.model.norm1.running_var = None
    return bundle


class Calls(nn.Module):
    """Normalizes by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        h = F.batch_norm(self.first(x.flatten(1)), n.running_mean, n.running_var, n.weight, n.bias, self.training)
        return self.head(F.relu(h))


def objective_of(bundle: Bundle) -> Objective:
    return Objective(bundle, TrainConfig(classifier="x", run_dir="y"), BATCH, torch.device("cpu"), torch.float64)


def assembled(bundle_dir: Path, **changes: object) -> None:
    run = TrainConfig(classifier=str(bundle_dir), run_dir=str(bundle_dir / "run"), device="cpu", **changes)
    train(run, World.start("cpu", False, LaunchEnvironment()))


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "deterministic sums": (
        functools.partial(assembled, deterministic=True),
        r"deterministic=true .*BatchNorm.*stationarity\.statistics=auto",
        "deterministic=false",
    ),
    "one sample": (functools.partial(assembled, global_batch=1), r"global_batch=1 .*BatchNorm", "larger global_batch"),
    "a prior without statistics": (
        functools.partial(
            assembled,
            prior=PriorConfig(statistics=0.5),
            stationarity=StationarityConfig(statistics="frozen"),
        ),
        r"prior\.statistics=0\.5 .*stationarity\.statistics=frozen",
        "prior.statistics=0",
    ),
    "an unknown choice": (
        lambda _: StationarityConfig(statistics="other"),
        r"stationarity\.statistics=other",
        "auto, batch, frozen",
    ),
    "a negative weight": (lambda _: PriorConfig(statistics=-1.0), r"prior\.statistics=-1\.0", ">= 0"),
    "no running statistics": (
        lambda _: objective_of(untracked()),
        r"'norm1' \(BatchNorm1d\).*track_running_stats=False",
        "track_running_stats=True",
    ),
    "a call": (
        lambda _: objective_of(dataclasses.replace(normed(), model=Calls().double().eval())),
        r"stationarity\.statistics=auto .*batch_norm",
        "stationarity.statistics=frozen",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_with_field_value_and_fix(tmp_path, case):
    attempt, what, hint = REFUSED[case]
    save_bundle(normed(), tmp_path / "classifier")
    with pytest.raises(UserError, match=what) as caught:
        attempt(tmp_path / "classifier")
    assert hint in caught.value.hint
