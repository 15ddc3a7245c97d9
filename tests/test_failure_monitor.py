"""Laws of the watch: a failing run is told of, stopped or slowed as its policy says, and goes on after a cut as if there had been none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.common import random_classifier
from benchmarks.launched import differences
from hpc_c2g.errors import UserError
from hpc_c2g.monitoring.config import AlarmConfig, LogConfig
from hpc_c2g.monitoring.signatures import GRACE, WINDOW
from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import CheckpointConfig, OptimizerConfig, TrainConfig
from hpc_c2g.training.failure_monitor import FailureMonitor
from hpc_c2g.training.loop import train
from tests.test_signatures import FAILING, GOOD

STEPS = 40
BAD = GOOD | FAILING["mode_collapse"]


@pytest.fixture(scope="module")
def failing(tmp_path_factory) -> TrainConfig:
    """A run whose weights explode: instability, and samples that satisfy nothing."""
    folder = tmp_path_factory.mktemp("failing")
    return TrainConfig(
        str(random_classifier(folder / "classifier")),
        str(folder / "run"),
        steps=STEPS,
        global_batch=16,
        alpha=AlphaConfig(init=0.0, max_change=0.0),
        optimizer=OptimizerConfig(lr=1.0),
        log=LogConfig(every=1, progress=False),
        checkpoint=CheckpointConfig(every=5, keep=100),
        device="cpu",
        deterministic=True,
        deterministic_shards=2,
    )


def into(config: TrainConfig, run_dir: Path, policy: str, **changes) -> TrainConfig:
    return dataclasses.replace(config, run_dir=str(run_dir), alarms=AlarmConfig(policy), **changes)


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def first_alarm(run_dir: Path) -> int:
    return next(line["step"] for line in lines(run_dir) if any(v for k, v in line.items() if k.startswith("alarm/")))


def looks(monitor: FailureMonitor, *judged: dict[str, float], start: int = 1) -> list[tuple[str, ...]]:
    return [monitor.update(step, line).firing for step, line in enumerate(judged, start)]


def test_nothing_is_judged_before_the_grace_and_a_window_are_over():
    firing = looks(FailureMonitor(AlarmConfig(), STEPS), *[BAD] * STEPS)
    silent = int(GRACE * STEPS) + WINDOW - 1
    assert firing == [()] * silent + [("mode_collapse",)] * (STEPS - silent)


def test_an_alarm_begins_once_and_ends_when_the_run_recovers():
    monitor = FailureMonitor(AlarmConfig(), 1)
    newly_firing = [
        monitor.update(2 + i, line).newly_firing for i, line in enumerate([BAD] * 15 + [GOOD] * 15 + [BAD] * 15)
    ]
    assert [i for i, names in enumerate(newly_firing) if names] == [9, 35]
    assert monitor.state.firing == ("mode_collapse",)


@pytest.mark.parametrize(("policy", "lr_scale"), [("continue", 1.0), ("stop", 1.0), ("lower_lr", 0.25)])
def test_the_rate_is_lowered_each_time_an_alarm_begins_where_the_policy_says_so(policy, lr_scale):
    monitor = FailureMonitor(AlarmConfig(policy), 1)
    looks(monitor, *[BAD] * 15, *[GOOD] * 15, *[BAD] * 15, start=2)
    assert monitor.state.lr_scale == pytest.approx(lr_scale)


@pytest.mark.parametrize("cut", range(0, 30, 3))
def test_a_watch_that_goes_on_from_its_state_finds_what_an_unbroken_one_finds(cut):
    judged = [BAD if i % 13 > 4 else GOOD for i in range(30)]
    whole, first = FailureMonitor(AlarmConfig("lower_lr"), 1), FailureMonitor(AlarmConfig("lower_lr"), 1)
    wanted = [whole.update(2 + i, line) for i, line in enumerate(judged)]
    found = [first.update(2 + i, line) for i, line in enumerate(judged[:cut])]
    second = FailureMonitor(AlarmConfig("lower_lr"), 1, json.loads(json.dumps(first.state_dict())))
    found += [second.update(2 + i, line) for i, line in enumerate(judged[cut:], cut)]
    assert [(v.firing, v.newly_firing, v.lr_scale) for v in found] == [
        (v.firing, v.newly_firing, v.lr_scale) for v in wanted
    ]


def test_by_default_a_failing_run_continues_with_a_warning(failing, tmp_path, caplog):
    train(into(failing, tmp_path / "run", "continue"))
    assert lines(tmp_path / "run")[-1]["step"] == STEPS
    assert first_alarm(tmp_path / "run") == int(GRACE * STEPS) + WINDOW
    first = first_alarm(tmp_path / "run")
    assert any(getattr(r, "step", 0) == first and r.message.startswith("mode_invention") for r in caplog.records)


def test_stop_ends_a_failing_run_saved_and_names_reason_advice_and_way_on(failing, tmp_path):
    run = into(failing, tmp_path / "run", "stop")
    with pytest.raises(UserError) as caught:
        train(run)
    last = lines(tmp_path / "run")[-1]["step"]
    assert last == int(GRACE * STEPS) + WINDOW
    for words in (f"step {last}: mode_invention", "satisfy no condition", "alarms.policy=stop"):
        assert words in caught.value.problem
    assert "alarms.policy=continue" in caught.value.hint
    newest = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig()).latest()
    assert newest is not None
    assert newest.step == last
    with pytest.raises(UserError, match=rf"step {last + 1}: mode_invention"):  # it has not changed its mind
        train(run)
    train(dataclasses.replace(run, alarms=AlarmConfig("continue")))
    assert lines(tmp_path / "run")[-1]["step"] == STEPS


def test_a_run_that_was_slowed_and_cut_ends_in_the_same_bits_as_an_unbroken_one(failing, tmp_path):
    whole, cut, free = (into(failing, tmp_path / name, policy) for name, policy in NAMES.items())
    for run in (whole, free):
        train(run)
    short = tmp_path / "cut"
    train(cut)
    for step in range(25, STEPS + 1, 5):  # as if it had been killed after step 20
        for folder in short.glob(f"checkpoints/step_*{step}"):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    train(cut)
    assert differences(tmp_path / "whole", short) == []
    assert "metrics.jsonl" in differences(tmp_path / "whole", tmp_path / "free")
    with pytest.raises(UserError, match=r"log\.every=1 there, 2 now"):  # when it is looked at decides when it slows
        train(dataclasses.replace(cut, log=LogConfig(every=2, progress=False)))


NAMES = {"whole": "lower_lr", "cut": "lower_lr", "free": "continue"}


@pytest.mark.parametrize("change", [{"policy": "halt"}, {"policy": "lower_rate"}])
def test_bad_settings_are_named(change):
    (name,) = change
    with pytest.raises(UserError, match=rf"alarms\.{name}={change[name]}"):
        AlarmConfig(**change)
