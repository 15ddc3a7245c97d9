"""Laws of a run: it learns, writes what it promises, resumes bitwise, and ends cleanly however it is stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_flatten

from benchmarks.launched import TIMED
from hpc_c2g.classifiers.bundle import load_bundle
from hpc_c2g.data.config import DataConfig
from hpc_c2g.errors import UserError
from hpc_c2g.fitting.config import ClassifierConfig, MarginFitConfig
from hpc_c2g.fitting.make import make_classifier
from hpc_c2g.generators.config import ConvGeneratorConfig, FreeImagesConfig, MLPGeneratorConfig
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.monitoring.signatures import SIGNATURES
from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config.objective import AlphaConfig, DualityConfig, PriorConfig
from hpc_c2g.training.config.train import CheckpointConfig, OptimizerConfig, TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.preemption import Preempted
from hpc_c2g.training.step.train_step import TrainStep

STEPS, STEPS_OF_SHORT, MARGIN = 60, 4, 50.0


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory) -> Path:
    """Three digits, fitted to a margin of 50."""
    out = tmp_path_factory.mktemp("bundle") / "classifier"
    data = DataConfig(train_size=30, classes=[0, 1, 2])
    fit = MarginFitConfig(target_margin=MARGIN, dtype="float32")
    make_classifier(ClassifierConfig(out=str(out), data=data, model={"_target_": "mlp", "width": 32}, fit=fit))
    return out


@pytest.fixture(scope="module")
def base(classifier_dir) -> TrainConfig:
    """All terms of the loss are on."""
    return TrainConfig(
        classifier=str(classifier_dir),
        run_dir="unset",
        steps=STEPS,
        global_batch=30,
        device="cpu",
        alpha=AlphaConfig(init=1 - math.log(MARGIN)),  # on the high side
        duality=DualityConfig(slackness=0.01),
        prior=PriorConfig(total_variation=0.01, mean=0.01),
        log=LogConfig(every=5, images_every=20, progress=False),
        checkpoint=CheckpointConfig(every=20, keep=9),
    )


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """A complete run of ``base``."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert train(replace(base, run_dir=str(run_dir))).steps_made == STEPS
    return run_dir


def short(base: TrainConfig, run_dir: Path, **changes) -> TrainConfig:
    settings = {"steps": STEPS_OF_SHORT, "checkpoint": CheckpointConfig(every=2, keep=9), **changes}
    return replace(base, run_dir=str(run_dir), **settings)


def newest(run_dir: Path):
    return Checkpoints(run_dir / "checkpoints", CheckpointConfig()).latest()


def published(run_dir: Path) -> list[int]:
    return Checkpoints(run_dir / "checkpoints", CheckpointConfig()).steps()


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not TIMED.fullmatch(k)} for line in lines]


def assert_same_end(run_dir: Path, other: Path) -> None:
    """Weights, optimizer, alpha and every logged number, bitwise."""
    (mine, spec), (theirs, other_spec) = (tree_flatten(newest(r).state) for r in (run_dir, other))
    assert spec == other_spec
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert metrics(run_dir) == metrics(other)
    assert (run_dir / "samples.png").read_bytes() == (other / "samples.png").read_bytes()


def at_step(monkeypatch, number: int, action) -> None:
    """Call ``action`` while step ``number`` runs."""
    original = TrainStep.__call__

    def call(self, step, *rest):
        if step == number:
            action()
        return original(self, step, *rest)

    monkeypatch.setattr(TrainStep, "__call__", call)


def crash() -> None:
    raise RuntimeError("power cut")


def test_it_learns(finished):
    lines = metrics(finished)
    assert lines[-1]["stationarity"] < 0.2 * lines[0]["stationarity"]
    assert min(line["alpha"] for line in lines) < lines[0]["alpha"]


def test_metrics_have_a_line_per_due_step_with_the_promised_keys(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, *range(5, STEPS + 1, 5)]
    for line in lines:
        assert {"loss", "stationarity", "duality", "alpha", "samples_per_second"} <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        per_tensor = [v for k, v in line.items() if k.startswith("stationarity/")]
        assert len(per_tensor) == 3
        assert sum(per_tensor) == pytest.approx(line["stationarity"])
        others = ("box", "duality", "total_variation", "standard")
        assert line["loss"] == pytest.approx(line["stationarity"] + sum(line[k] for k in others))


def test_tensorboard_holds_every_promised_curve_and_picture(base, finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    promised = {"loss", "stationarity", "duality", "feasibility", "slackness", "box", "alpha", "rho"}
    promised |= {f"stationarity/{name}" for name in load_bundle(base.classifier).parameters}
    promised |= {f"{kind}/q{q}" for kind in ("margins", "multipliers") for q in ("05", "25", "50", "75", "95")}
    promised |= {"diversity", "unsupported", "class_mass", "roughness", "saturation", "time/kkt_sum", "time/checkpoint"}
    promised |= {f"{kind}/{s.name}" for kind in ("signature", "alarm") for s in SIGNATURES}
    promised |= {"multipliers/share_of_zeros", "gradient/x", "gradient/multipliers", "memory/peak_gib"}
    assert promised | {"samples_per_second"} <= tags
    lines = metrics(finished)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]
    assert [event.step for event in events.Images("samples")] == [1, 20, 40, 60]


def test_running_a_complete_run_again_does_nothing(base, finished):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in finished.rglob("*") if p.is_file()}
    assert train(replace(base, run_dir=str(finished))).steps_made == 0
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in finished.rglob("*") if p.is_file()}
    assert {p for p in before if before[p] != after[p]} <= {finished / ".lock"}
    assert before.keys() == after.keys()


def test_a_crash_between_checkpoints_leaves_no_trace_in_the_resumed_run(base, finished, tmp_path, monkeypatch):
    config = replace(base, run_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        at_step(patch, 37, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    assert published(tmp_path / "run") == [20]
    assert metrics(tmp_path / "run")[-1]["step"] == 35  # beyond the checkpoint
    time.sleep(1.1)  # a file of events is ordered by the second it began in
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 36, "lo')  # cut in the middle of a line
    assert train(config).steps_made == STEPS - 20
    assert_same_end(tmp_path / "run", finished)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, *range(5, STEPS + 1, 5)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda n: n.name)
def test_a_signal_saves_after_the_step_and_the_run_goes_on_bitwise(base, finished, tmp_path, monkeypatch, number):
    config = replace(base, run_dir=str(tmp_path / "run"))
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Preempted, match=f"{number.name}: saved after step 7"):
            train(config)
    assert published(tmp_path / "run") == [7]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)] == handlers
    assert train(config).steps_made == STEPS - 7
    assert_same_end(tmp_path / "run", finished)


def test_a_second_interrupt_stops_at_once(base, tmp_path, monkeypatch):
    def interrupt_twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 3, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train(short(base, tmp_path))
    assert published(tmp_path) == [2]


def test_a_signal_at_the_last_step_completes_the_run(base, tmp_path, monkeypatch):
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(short(base, tmp_path)).steps_made == 4
    assert published(tmp_path) == [2, 4]


def assert_close_to_the_way(weights: torch.Tensor, others: torch.Tensor) -> None:
    """Equal but for rounding; Adam makes much of the rounding of the few gradients that are almost zero."""
    way = 1e-3 * STEPS_OF_SHORT * weights.numel() ** 0.5  # every entry may go rate times steps
    assert float((weights - others).double().norm()) < 0.01 * way


@pytest.mark.parametrize("micro_batch", [7, 1])
def test_micro_batches_do_not_change_the_result(base, tmp_path, micro_batch):
    whole = short(base, tmp_path / "whole", log=LogConfig(every=1, progress=False))
    train(whole)
    train(replace(whole, run_dir=str(tmp_path / "pieces"), micro_batch=micro_batch))
    a, b = (newest(tmp_path / name).state for name in ("whole", "pieces"))
    for name, weights in a["engine"]["weights"].items():
        assert_close_to_the_way(b["engine"]["weights"][name], weights)
    assert b["scale"]["alpha"] == pytest.approx(a["scale"]["alpha"], abs=1e-6)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "pieces"), strict=True):
        for name in (k for k in one if "/q" not in k and "share" not in k):  # those look at the last micro-batch alone
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


def test_a_run_may_go_on_with_other_micro_batches(base, tmp_path):
    train(short(base, tmp_path / "whole"))
    config = short(base, tmp_path / "run", micro_batch=10)
    train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    assert train(replace(config, micro_batch=None)).steps_made == 2
    a, b = (newest(tmp_path / name).state["engine"]["weights"] for name in ("whole", "run"))
    for name, weights in a.items():
        assert_close_to_the_way(b[name], weights)


def test_deterministic_runs_are_bitwise_equal(base, tmp_path):
    for name in ("one", "other"):
        train(short(base, tmp_path / name, deterministic=True, global_batch=24))
        assert torch.are_deterministic_algorithms_enabled()
        torch.randn(3)  # nobody depends on the global generator
    assert_same_end(tmp_path / "one", tmp_path / "other")


KINDS = {
    "convolutional": {"generator": ConvGeneratorConfig(channels=8, codes=2)},
    "without codes": {"generator": MLPGeneratorConfig(codes=0)},
    "free images": {"generator": FreeImagesConfig()},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 in micro-batches": {"dtype": "bfloat16", "micro_batch": 11},
    "pilot": {"alpha": AlphaConfig(pilot_steps=3)},
    "classification alone": {"stationarity": replace(TrainConfig().stationarity, weight=0.0)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_trains_and_resumes_bitwise(base, tmp_path, kind):
    config = short(base, tmp_path / "whole", **KINDS[kind])
    assert train(config).steps_made == 4
    weights = newest(tmp_path / "whole").state["engine"]["weights"]
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    assert train(replace(config, run_dir=str(tmp_path / "run"))).steps_made == 2
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the picture of what exploded
def test_a_term_that_is_not_finite_stops_before_the_update_and_is_named(base, tmp_path):
    # codes and the weights on them together overflow with both signs, whatever their first gradients were
    optimizer = OptimizerConfig(lr=1e20, lr_codes=1e20)
    config = short(base, tmp_path, optimizer=optimizer, checkpoint=CheckpointConfig(every=1))
    with pytest.raises(UserError, match=r"step 2: the term 'stationarity/\S+' is (nan|inf); the generator was not"):
        train(config)
    assert published(tmp_path) == [1]
    assert all(bool(torch.isfinite(t).all()) for t in newest(tmp_path).state["engine"]["weights"].values())


@pytest.mark.parametrize("what", ["step_00000004", "samples.png"])
def test_a_full_disk_names_the_path_and_the_run_is_completed_later(base, tmp_path, monkeypatch, what):
    replace_file = os.replace

    def refuse(source, target):
        if what in str(target):
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match=rf"cannot write \S+{what}: No space left on device"):
            train(short(base, tmp_path))
    assert published(tmp_path) == [2]
    assert train(short(base, tmp_path)).steps_made == 2
    assert published(tmp_path) == [2, 4]
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize(("batch", "told"), [(30, False), (31, True)])
def test_a_batch_that_meets_some_codes_more_often_is_a_warning(base, tmp_path, caplog, batch, told):
    codes = replace(base.generator, codes=5)
    train(replace(base, run_dir=str(tmp_path / "run"), steps=1, global_batch=batch, generator=codes, log=LogConfig()))
    said = " ".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert ("is no multiple of classes x codes = 15" in said) is told
    assert ("45 would not" in said) is told
