"""The benchmarks run, and what the wire's asserts: every byte that training hands to a collective is accounted for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.common
from benchmarks import floor, gpu, throughput, wire
from benchmarks.kkt import error, one_pass


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(benchmarks.common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick"])
    return tmp_path


def test_four_bytes_per_weight_and_the_generator_s_gradient_are_all_that_is_sent(results: Path) -> None:
    wire.main()  # ends in an error where a byte is not accounted for
    content = json.loads((results / "wire_quick.json").read_text())
    rows = {row["case"]: row for row in content["rows"]}
    P = content["settings"]["P"]
    assert rows["one pass"]["residual bytes"] == rows["two passes of 1/8"]["residual bytes"] == 4 * P
    assert rows["bfloat16 wire"]["residual bytes"] == pytest.approx(2 * P, rel=1e-3)
    assert rows["2 classifiers, a group each"]["residual bytes"] == 0  # a rank alone with its classifier
    assert rows["2 classifiers on every rank"]["residual bytes"] == 8 * P
    assert all(row["small"] < 8192 for row in rows.values())


def test_a_result_names_the_machine_and_the_settings(results: Path) -> None:
    throughput.main()
    content = json.loads((results / "throughput_quick.json").read_text())
    assert content["settings"]["quick"] is True
    assert content["machine"]["cores"] >= 1
    assert [row["step"] for row in content["rows"]][:2] == ["joint graph", "one pass"]


def test_a_gradient_that_is_no_number_is_no_match() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, torch.nan])
    for found in ((bad, good), (good, bad)):
        assert not error(found, (good, good)) <= 1.0
    assert error((good, 2 * good), (good, good)) == 1.0


def test_every_way_of_a_gradient_is_checked_before_it_is_timed(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    floor.main()
    content = json.loads((results / "floor_quick.json").read_text())
    rows = {row["way"]: row for row in content["kkt"]}
    assert rows["floor"]["x floor"] == 1
    assert all(row["error"] <= 1e-4 for row in rows.values())
    monkeypatch.setattr(
        floor, "two_passes", lambda objective, samples, size, total: [2 * t for t in one_pass(objective, samples)]
    )
    with pytest.raises(SystemExit, match="not the gradient"):
        floor.main()
    capsys.readouterr()


def test_the_gpu_benchmark_runs_whole_where_there_is_none(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--all", "--quick"])
    gpu.main()
    content = json.loads((results / "gpu_quick.json").read_text())
    assert set(content["asked"]) == set(gpu.MUST)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--all"])
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main()
