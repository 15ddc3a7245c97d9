"""Laws of the run's log: a line per logged step and no other, true quantiles, quiet on request, and one error for a full disk."""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.logs import warnings_logged
from helpers.trainers import normed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from hpc_c2g.classifiers.bundle import save_bundle
from hpc_c2g.distributed.reduction import RunningSum
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.kkt.loss_terms import loss_names
from hpc_c2g.monitoring import sample_metrics, step_scalars
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.monitoring.curves import Curve
from hpc_c2g.monitoring.layout import AVERAGED, LEARNING_CURVES, layout
from hpc_c2g.monitoring.run_log import MetricsFile, RunLog, due, writer_of
from hpc_c2g.monitoring.sample_metrics import SampleMetric
from hpc_c2g.monitoring.step_scalars import StepScalar
from hpc_c2g.training.config.objective import AlphaConfig, DualityConfig, PriorConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.step import step_metrics
from hpc_c2g.training.step.step_metrics import MetricAccumulator

QUIET = LogConfig(every=4, images_every=6, progress=False)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, steps) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps))


def scalars(step: int) -> dict[str, float]:
    return {"stationarity": 1 / step, "loss": 2 / step}


def run(log: RunLog, start: int, stop: int) -> None:
    with log:
        for step in range(start, stop):
            log.step(step, scalars(step))


@pytest.fixture(scope="module")
def line_of(tmp_path_factory):
    """Names in the last lines of metrics of two runs over 1 or 2 classifiers, which together have every scalar: batch statistics
    exclude deterministic sums."""
    every = {"total_variation": 0.1, "mean": 0.1, "deviation": 0.1}
    kinds = {
        "deterministic": (False, PriorConfig(**every), {"deterministic": True}),
        "statistics": (True, PriorConfig(**every, statistics=0.1), {}),
    }

    @functools.cache
    def names(classifiers: int) -> frozenset[str]:
        found: set[str] = set()
        for kind, (batch_norm, prior, changes) in kinds.items():
            folder = tmp_path_factory.mktemp(kind)
            bundles = [str(folder / f"classifier{k}") for k in range(classifiers)]
            for k, bundle in enumerate(bundles):
                save_bundle(normed(width=8 + k, batch_norm=batch_norm), Path(bundle))
            settings = {"steps": 15, "log": LogConfig(every=1, progress=False), "alpha": AlphaConfig(init=0.0)}
            settings |= {"duality": DualityConfig(slackness=0.1), "prior": prior, **changes}
            train(TrainConfig(bundles, str(folder / "run"), global_batch=16, device="cpu", **settings))
            found |= lines(folder / "run" / "metrics.jsonl")[-1].keys()
        return frozenset(found)

    return names


class FullDisk:
    """A file on a full disk."""

    def __init__(self, file) -> None:
        self.file = file

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    close = flush


@pytest.mark.parametrize("resumed", [0, 4, 6, 20])
def test_a_resumed_file_drops_the_lines_after_the_checkpoint(tmp_path, resumed):
    path = tmp_path / "metrics.jsonl"
    written(path, [2, 4, 6, 8])
    file = MetricsFile(path, resumed)
    file.write({"step": resumed + 1})
    file.close()
    assert [line["step"] for line in lines(path)] == [s for s in (2, 4, 6, 8) if s <= resumed] + [resumed + 1]
    assert lines(path)[0].get("loss") == (1.0 if resumed else None)


@pytest.mark.parametrize(
    "half", ['{"step": 6, "lo', '{"step": 6, "loss": 1.0', "{", "\0\0\0", "null", "[6]", '{"loss": 1.0}']
)
def test_a_half_written_line_is_dropped_with_a_warning_where_it_is_not_the_last(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    written(path, [2])
    with open(path, "a") as file:
        file.write(half + '\n{"step": 4, "loss": 2.0}\n' + half)
    with warnings_logged("line 2 is damaged") as told:
        metrics = MetricsFile(path, 100)
    assert len(told) == 1
    metrics.write({"step": 101})
    metrics.close()
    assert [line["step"] for line in lines(path)] == [2, 4, 101]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1})
    assert [line["step"] for line in lines(metrics.path)] == [1]
    metrics.close()


def test_due_are_the_first_the_last_and_every_so_many_steps():
    assert [step for step in range(1, 11) if due(step, QUIET.every, 10)] == [1, 4, 8, 10]
    assert [step for step in range(1, 11) if due(step, QUIET.images_every, 10)] == [1, 6, 10]


def test_only_due_steps_are_written_to_either_file(tmp_path):
    run(RunLog(tmp_path, QUIET, 10, 8, 0), 1, 11)
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 4, 8, 10]
    assert [line["loss"] for line in found] == [2, 0.5, 0.25, 0.2]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, pytest.approx(2 / s)) for s in (1, 4, 8, 10)]


def test_a_resumed_log_hides_the_curve_after_the_checkpoint(tmp_path):
    run(RunLog(tmp_path, QUIET, 16, 8, 0), 1, 13)
    time.sleep(0.01)
    run(RunLog(tmp_path, QUIET, 16, 8, 8), 9, 17)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 4, 8, 12, 16]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 4, 8, 12, 16]


def accumulated(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    return events


def test_all_scalars_of_a_step_are_one_event(tmp_path):
    run(RunLog(tmp_path, QUIET, 10, 8, 0), 1, 11)
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = [event for event in EventFileLoader(str(file)).Load() if event.summary.value]
    assert [event.step for event in events] == [1, 4, 8, 10]
    assert {value.tag for value in events[0].summary.value} == {*scalars(1), "samples_per_second", "memory/peak_gib"}


def test_a_run_introduces_itself_before_its_first_step(tmp_path):
    log = RunLog(tmp_path, QUIET, 10, 8, 0)
    with log:
        log.log_run_summary(
            {"1 settings": "steps: 10", "2 versions": "torch"},
            {"rate": 0.1, "kind": "mlp", "on": True},
            [""],
            loss_names(),
        )
        log.step(10, scalars(10))
    tags = accumulated(tmp_path).Tags()["tensors"]
    assert {"1 settings/text_summary", "2 versions/text_summary", "custom_scalars__config__"} <= set(tags)
    (file,) = (tmp_path / "hparams").iterdir()
    summaries = {value.tag for event in EventFileLoader(str(file)).Load() for value in event.summary.value}
    assert {"_hparams_/session_start_info", "stationarity", "loss"} <= summaries
    assert "_hparams_/experiment" not in summaries  # one run's columns would hide the others'


PREFIXES = [[""], ["classifier0/", "classifier1/"], ["solution0/", "solution1/"]]


def names_of(line_of, prefixes: list[str]) -> set[str]:
    what = "solution" if prefixes[0].startswith("solution") else "classifier"
    return {re.sub("^classifier", what, name) for name in line_of(len(prefixes))}


def drawn_by(kind: str, patterns: list[str], names: set[str]) -> set[str]:
    """The curves of a chart, as TensorBoard finds them."""
    return {n for n in names for p in patterns if (n == p if kind == "Margin" else re.match(p, n))}


@pytest.mark.parametrize("prefixes", PREFIXES)
def test_every_chart_of_the_layout_finds_a_curve_that_a_run_writes(prefixes, line_of):
    names = names_of(line_of, prefixes)
    for charts in layout(prefixes, loss_names()).values():
        for title, (kind, patterns) in charts.items():
            found = drawn_by(kind, patterns, names)
            alone = "per classifier" in title and len(prefixes) == 1  # the total says it all
            ranks = "slowest" in title  # one process is not slower than itself
            assert bool(found) is not (alone or ranks), title
            assert kind != "Margin" or len(found) == 3, title


@pytest.mark.parametrize("prefixes", PREFIXES)
def test_every_scalar_that_a_run_writes_is_on_a_chart(prefixes, line_of):
    names = names_of(line_of, prefixes) - {"step"}
    assert {f"{prefixes[0]}{name}" for name in loss_names()} <= names
    assert any(name.startswith("alarm/") for name in names)
    charts = [chart for part in layout(prefixes, loss_names()).values() for chart in part.values()]
    assert names - set().union(*(drawn_by(kind, patterns, names) for kind, patterns in charts)) == set()


def test_a_loss_is_charted_by_its_name_alone(line_of):
    (charts,) = (part for part in layout([""], ["new_loss"]).values() if "losses" in part)
    assert drawn_by(*charts["losses"], {"new_loss", "box", "loss"}) == {"new_loss", "loss"}


@pytest.mark.parametrize("several", [False, True])
def test_a_curve_that_a_study_averages_is_one_that_a_run_writes(several, line_of):
    assert set(AVERAGED) <= line_of(2 if several else 1)
    assert set(LEARNING_CURVES) <= set(AVERAGED)


def test_a_metric_of_samples_is_logged_and_charted_by_one_entry(monkeypatch):
    entry = SampleMetric(
        lambda b: float(b.samples.max()), Curve("brightest", "Samples", "brightest pixel", averaged=True)
    )
    monkeypatch.setattr(sample_metrics, "SAMPLE_METRICS", (*sample_metrics.SAMPLE_METRICS, entry))
    monkeypatch.delitem(sys.modules, "hpc_c2g.monitoring.layout")
    fresh = importlib.import_module("hpc_c2g.monitoring.layout")
    rng = np.random.default_rng(0)
    batch = rng.random(6), rng.random((6, 2)), np.arange(6) % 3, rng.random((6, 1, 2, 2)), 3
    assert sample_metrics.sample_metrics(*batch)["brightest"] == batch[3].max()
    assert fresh.layout([""], [])["Samples"]["brightest pixel"][1] == [entry.curve.pattern]
    assert "brightest" in fresh.AVERAGED


def test_a_scalar_of_a_step_is_logged_and_charted_by_one_entry(monkeypatch):
    entry = StepScalar("twice", lambda sums, alpha: 2 * sums["sum_mu"], Curve("twice", "Speed", "twice", averaged=True))
    added = (*step_scalars.STEP_SCALARS, entry)
    monkeypatch.setattr(step_scalars, "STEP_SCALARS", added)
    monkeypatch.setattr(step_metrics, "STEP_SCALARS", added)
    monkeypatch.delitem(sys.modules, "hpc_c2g.monitoring.layout")
    fresh = importlib.import_module("hpc_c2g.monitoring.layout")
    assert fresh.layout([""], [])["Speed"]["twice"][1] == [entry.curve.pattern]
    assert "twice" in fresh.AVERAGED
    world = World.single_process(torch.device("cpu"))
    accumulator = MetricAccumulator([["w"]], [["feasibility"]], RunningSum(world), world.device)
    sums = dict.fromkeys(("feasibility", "sum_mu_m", "sum_mu", "gx", "gmu", "stationarity/w"), 3.0)
    assert accumulator.summarize([sums], [0.0], 1.0, 1.0)["twice"] == 6.0


def test_an_alarm_is_logged_with_its_step_and_written_to_tensorboard(tmp_path, caplog):
    log = RunLog(tmp_path, QUIET, 10, 8, 0)
    with log:
        log.step(4, scalars(4), ["instability"])
    (record,) = caplog.records
    assert (record.name, record.levelname, record.step) == ("hpc_c2g.monitoring.run_log", "WARNING", 4)
    assert record.getMessage().startswith("instability: the residual or the gradient")
    assert "alarm/instability/text_summary" in accumulated(tmp_path).Tags()["tensors"]


def test_a_picture_is_bounded(tmp_path):
    log = RunLog(tmp_path, QUIET, 10, 8, 0)
    with log:
        log.images(1, "many", torch.rand(1000 * 100, 1, 8, 8), 1000)
        log.images(1, "large", torch.rand(1, 1, 5000, 300), 1)
    for tag in ("many", "large"):
        (image,) = accumulated(tmp_path).Images(tag)
        assert max(image.width, image.height) <= 2048 + 2
    assert (image.height, image.width) == (1667 + 2, 100 + 2)


def test_samples_per_second_counts_the_steps_since_the_last_line(tmp_path, monkeypatch):
    clock = iter([100.0, 101.0, 103.0])  # at the start, at step 9 + 3, at step 9 + 7
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    run(RunLog(tmp_path, QUIET, 40, 10, 9), 10, 17)
    assert [line["samples_per_second"] for line in lines(tmp_path / "metrics.jsonl")] == [30.0, 20.0]


def test_progress_shows_the_residual_on_stderr_and_can_be_off(tmp_path, capfd):
    run(RunLog(tmp_path, QUIET, 4, 8, 0), 1, 5)
    assert capfd.readouterr() == ("", "")
    run(RunLog(tmp_path, LogConfig(every=4), 4, 8, 0), 1, 5)
    out, err = capfd.readouterr()
    assert out == ""
    assert "4/4" in err
    assert "residual 0.2500" in err


def test_a_full_disk_is_named_once(tmp_path):
    log = RunLog(tmp_path, QUIET, 10, 8, 0)
    log.metrics._file.close()
    log.metrics._file = FullDisk(log.metrics._file)
    with pytest.raises(UserError) as caught:  # closing fails as well, and must not hide the first failure
        run(log, 1, 5)
    assert f"cannot write {tmp_path / 'metrics.jsonl'}: No space left on device" in caught.value.problem


def test_a_disk_that_is_full_at_the_end_is_named(tmp_path):
    log = RunLog(tmp_path, QUIET, 10, 8, 0)
    log.metrics._file.close()
    log.metrics._file = FullDisk(log.metrics._file)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}"), log:
        pass


@pytest.mark.parametrize("what", ["scalars", "image"])
def test_tensorboard_on_a_full_disk_is_named(tmp_path, monkeypatch, what):
    log = RunLog(tmp_path, QUIET, 10, 8, 0)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_of(log.board), "add_summary", refuse)
    call = {
        "scalars": lambda: log.step(1, scalars(1)),
        "image": lambda: log.images(1, "samples", torch.zeros(4, 1, 2, 2), 2),
    }[what]
    with pytest.raises(UserError, match=r"cannot write \S+tensorboard: No space left on device"), log:
        call()
