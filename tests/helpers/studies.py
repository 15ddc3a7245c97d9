"""Small studies for tests: two digits, a few steps, no DeepSpeed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from benchmarks.launched import differences
from hpc_c2g.studies.reports import Report, read_report
from hpc_c2g.studies.task_status import read_statuses
from hpc_c2g.studies.tasks import TaskInfo
from launch.__main__ import main

ROOT = Path(__file__).parents[2]
SMALL = (
    "study=batch_scaling",
    "study.stages=[classifier,train]",
    "data.classes=[0,1]",
    "data.train_size=20",
    "model.width=8",
    "fit.target_margin=3",
    "global_batch=8",
    "alpha.init=-1",
    "steps=4",
    "log.every=1",
    "deterministic=true",
    "deterministic_shards=4",
    "seed=0",
)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(*arguments: object) -> subprocess.Popen[str]:
    """``c2g`` in a process of its own."""
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def c2g(*arguments: object, code: int | None = 0) -> str:
    """What ``c2g`` prints in this process, output and errors; its exit code must be ``code`` if that is not None."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
        patch.setattr(sys, "argv", ["c2g", *map(str, arguments)])
        try:
            main()
            got: Any = 0
        except SystemExit as stop:
            got = stop.code or 0
    assert code is None or got == code, f"{got}: {out.getvalue()}"
    return out.getvalue()


def sweep(study_dir: Path, *more: str, code: int | None = 0) -> str:
    """``c2g sweep`` of a small study."""
    return c2g("sweep", *SMALL, f"study_dir={study_dir}", *more, code=code)


def tasks(study_dir: Path, stage: str) -> list[TaskInfo]:
    return [s.task for s in read_statuses(study_dir, None) if s.task.stage == stage]


def report(study_dir: Path, task: TaskInfo) -> Report:
    found = read_report(study_dir, task)
    assert found is not None, task
    return found


def status(study_dir: Path) -> dict[str, Any]:
    """``c2g status --json``."""
    answer: dict[str, Any] = json.loads(c2g("status", study_dir, "--json"))
    return answer


def states(study_dir: Path) -> dict[str, list[str]]:
    """States of the tasks of each stage."""
    found: dict[str, list[str]] = {}
    for task in status(study_dir)["tasks"]:
        found.setdefault(task["stage"], []).append(task["state"])
    return found


def assert_same_runs(one: Path, other: Path) -> None:
    """Every training run of both studies ends in the same bits."""
    ids = {task.id for task in tasks(one, "train")}
    assert ids == {task.id for task in tasks(other, "train")}
    assert ids
    for task in tasks(one, "train"):
        assert differences(one / task.folder, other / task.folder) == []


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(study_dir: Path) -> int:
    """Lines of metrics of all runs."""
    return sum(f.read_text().count("\n") for f in study_dir.glob("runs/*/metrics.jsonl"))
