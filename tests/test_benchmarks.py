"""The benchmarks run, and what the wire's asserts: every byte that training hands to a collective is accounted for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import benchmarks.common
from benchmarks import throughput, wire


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(benchmarks.common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick"])
    return tmp_path


def test_four_bytes_per_weight_and_the_generator_s_gradient_are_all_that_is_sent(results: Path) -> None:
    wire.main()  # ends in an error where a byte is not accounted for
    content = json.loads((results / "wire.json").read_text())
    rows = {row["case"]: row for row in content["rows"]}
    P = content["settings"]["P"]
    assert rows["one pass"]["residual bytes"] == rows["two passes of 1/8"]["residual bytes"] == 4 * P
    assert rows["bfloat16 wire"]["residual bytes"] == pytest.approx(2 * P, rel=1e-3)
    assert rows["2 classifiers, a group each"]["residual bytes"] == 0  # a rank alone with its classifier
    assert rows["2 classifiers on every rank"]["residual bytes"] == 8 * P
    assert all(row["small"] < 8192 for row in rows.values())


def test_a_result_names_the_machine_and_the_settings(results: Path) -> None:
    throughput.main()
    content = json.loads((results / "throughput.json").read_text())
    assert content["settings"]["quick"] is True
    assert content["machine"]["cores"] >= 1
    assert [row["step"] for row in content["rows"]][:2] == ["joint graph", "one pass"]
