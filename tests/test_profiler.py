"""Laws of the profiler: a trace of the chosen steps and ranks, ranges named as the phases, and the same bits with it as without."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from torch.utils._pytree import tree_flatten

from benchmarks.common import random_classifier
from benchmarks.launched import TIMED
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.monitoring.profiler import ProfilerConfig, StepProfiler
from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import CheckpointConfig, LogConfig, TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.step.phases import PHASES
from hpc_c2g.training.step.train_step import TrainStep

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return random_classifier(tmp_path_factory.mktemp("bundle") / "classifier", seed=0)


def settings(classifier: Path, run_dir: Path, profiler: ProfilerConfig, **changes) -> TrainConfig:
    config = TrainConfig(
        str(classifier),
        str(run_dir),
        steps=6,
        global_batch=16,
        device="cpu",
        profiler=profiler,
        alpha=AlphaConfig(init=0.0),
        log=LogConfig(every=1, images_every=10, progress=False),
        checkpoint=CheckpointConfig(every=6),
    )
    return replace(config, **changes)


def traces(run_dir: Path) -> list[str]:
    return sorted(file.name for file in (run_dir / "profiler").glob("*"))


def events(file: Path) -> list[dict]:
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def ranges(run_dir: Path, name: str) -> Counter[str]:
    """How often each phase is a range of the trace."""
    found = Counter(e["name"] for e in events(run_dir / "profiler" / name) if e.get("cat") == "user_annotation")
    return Counter({phase: found[phase] for phase in PHASES})


def outcome(run_dir: Path) -> tuple:
    """Weights, optimizer, alpha and every logged number that is no time."""
    leaves, spec = tree_flatten(Checkpoints(run_dir / "checkpoints", CheckpointConfig()).at(6).state)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in line.items() if not TIMED.fullmatch(k)} for line in lines]
    return [v.tolist() if isinstance(v, torch.Tensor) else v for v in leaves], str(spec), numbers


def test_the_trace_holds_the_phases_of_its_steps_and_changes_no_bit_of_the_run(classifier, tmp_path):
    train(settings(classifier, tmp_path / "plain", ProfilerConfig()))
    assert not (tmp_path / "plain" / "profiler").exists()
    train(settings(classifier, tmp_path / "traced", ProfilerConfig(steps=[2, 4])))
    (name,) = traces(tmp_path / "traced")
    assert name == "rank_00000_steps_2-4.pt.trace.json.gz"
    found = ranges(tmp_path / "traced", name)
    once = dict.fromkeys(("kkt_sum", "cotangents", "optimizer", "log", "checkpoint"), 3)
    assert found == Counter({**once, "all_reduce": 6})  # G, and the scalars
    assert any(e.get("name") == "[memory]" for e in events(tmp_path / "traced" / "profiler" / name))
    assert outcome(tmp_path / "traced") == outcome(tmp_path / "plain")


def of_a_rank(world: World, classifier: Path, run_dir: Path) -> None:
    train(settings(classifier, run_dir, ProfilerConfig(steps=[6, 6], ranks=[1])), world)


def test_only_the_chosen_ranks_write_a_trace(classifier, tmp_path):
    answers = run_ranks(2, tmp_path / "meeting", of_a_rank, classifier, tmp_path / "run")
    assert [kind for kind, _ in answers] == ["value", "value"]
    (name,) = traces(tmp_path / "run")
    assert name == "rank_00001_steps_6-6.pt.trace.json.gz"
    assert ranges(tmp_path / "run", name)["kkt_sum"] == 1  # written at the end of the run


def test_a_run_that_fails_within_the_steps_leaves_their_trace(classifier, tmp_path, monkeypatch):
    original = TrainStep.__call__

    def fails(self, step, *rest):
        if step == 3:
            raise UserError("the loss is not finite", "lower optimizer.lr")
        return original(self, step, *rest)

    monkeypatch.setattr(TrainStep, "__call__", fails)
    with pytest.raises(UserError, match="not finite"):
        train(settings(classifier, tmp_path, ProfilerConfig(steps=[2, 5])))
    (name,) = traces(tmp_path)
    assert ranges(tmp_path, name)["optimizer"] == 1


def test_a_trace_that_cannot_be_written_is_a_warning_and_the_run_continues(classifier, tmp_path, caplog):
    (tmp_path / "profiler").touch()
    assert train(settings(classifier, tmp_path, ProfilerConfig(steps=[2, 2]))).steps_made == 6
    (text,) = (r.getMessage() for r in caplog.records if r.name == "hpc_c2g.monitoring.profiler")
    assert text.startswith(f"profiler: {tmp_path}/profiler/rank_00000_steps_2-2")
    assert "cannot be written: File exists" in text


def test_a_run_that_resumes_beyond_the_steps_logs_that_nothing_is_traced(tmp_path, caplog):
    with StepProfiler(ProfilerConfig(steps=[2, 4]), tmp_path, 0, 1, CPU) as profiler:
        for step in (5, 6):
            profiler.before_step(step)
    assert [record.getMessage() for record in caplog.records] == [
        "profiler: nothing is traced: the run resumes after profiler.steps=[2, 4]"
    ]


def test_bad_settings_are_named():
    for steps in ([1], [0, 3], [4, 2], [1, 2, 3]):
        with pytest.raises(UserError, match=re.escape(f"profiler.steps={steps} is not possible")):
            ProfilerConfig(steps=steps)
    for ranks in ([], [-1]):
        with pytest.raises(UserError, match=r"profiler\.ranks="):
            ProfilerConfig(ranks=ranks)
    with pytest.raises(UserError, match=r"profiler\.steps=\[2, 7\] is not possible -- give steps from 1 to steps=6"):
        settings(Path("c"), Path("r"), ProfilerConfig(steps=[2, 7]))
    with pytest.raises(UserError, match=r"profiler\.ranks=\[0, 2\] names a rank that this job of 2 processes"):
        StepProfiler(ProfilerConfig(steps=[1, 2], ranks=[0, 2]), Path("r"), 0, 2, CPU)
    StepProfiler(ProfilerConfig(ranks=[0, 2]), Path("r"), 0, 2, CPU)  # off


def test_on_a_gpu_memory_is_recorded_during_the_steps_alone_and_written_as_a_snapshot(tmp_path, monkeypatch):
    calls: list[tuple] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **_: calls.append(("record", enabled)))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda file: calls.append(("dump", Path(file).name)))
    monkeypatch.setattr(torch.profiler, "profile", lambda **settings: calls.append(settings) or FakeTrace())
    config = ProfilerConfig(steps=[2, 2])
    with StepProfiler(config, tmp_path, 0, 1, torch.device("cuda", 0)) as profiler:
        for step in range(1, 5):
            profiler.before_step(step)
            calls.append(("step", step))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    assert calls == [
        ("step", 1),
        {"activities": activities, "profile_memory": True},
        ("record", "all"),
        ("step", 2),
        ("dump", "rank_00000_steps_2-2.memory.pickle"),
        ("record", None),
        ("step", 3),
        ("step", 4),
    ]


class FakeTrace:
    """A trace that records nothing."""

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def export_chrome_trace(self, file: str) -> None:
        Path(file).touch()
