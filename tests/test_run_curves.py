"""Laws of a run's curves: they are metrics.jsonl's numbers and TensorBoard's, and damage costs its line alone."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_c2g.monitoring.run_log import RunLog
from hpc_c2g.reporting import run_curves
from hpc_c2g.reporting.averages import Curves
from hpc_c2g.reporting.run_curves import FILE, NO_FILE, read_run, read_runs, stamp_of
from hpc_c2g.reporting.study_curves import WANTED, StudyCurves
from hpc_c2g.training.config.train import LogConfig

ALL = re.compile(".*")
VALUES = st.one_of(st.floats(), st.none(), st.integers(-5, 5))


def written(folder, steps, **scalars) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / FILE, "a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, **{name: value(step) for name, value in scalars.items()}}) + "\n")


def points(curves: Curves) -> dict[str, dict[int, float]]:
    return {tag: dict(zip(*(part.tolist() for part in curves.points(tag)), strict=True)) for tag in curves.tags}


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(
        st.tuples(st.integers(1, 9), st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)), max_size=9
    )
)
def test_curves_are_the_finite_numbers_of_the_last_line_of_each_step(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("run")
    (folder / FILE).write_text("".join(json.dumps({"step": step, **values}) + "\n" for step, values in lines))
    wanted: dict[str, dict[int, float]] = {}
    for step, values in dict(lines).items():
        for tag, value in values.items():
            if value is not None and math.isfinite(value):
                wanted.setdefault(tag, {})[step] = value
    curves = read_run(folder, ALL).curves
    assert points(curves) == wanted
    assert curves.tags == tuple(sorted(wanted))
    assert curves.steps.tolist() == sorted({step for one in wanted.values() for step in one})


def test_a_resumed_run_has_the_curves_that_tensorboard_shows(tmp_path):
    for start, stop, resumed in ((1, 13, 0), (9, 17, 8)):
        with RunLog(tmp_path, LogConfig(every=1, progress=False), 16, 8, resumed) as log:
            for step in range(start, stop):
                log.step(step, {"stationarity": 1 / step + resumed, "loss": 2.0 * step})
        time.sleep(0.01)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = points(read_run(tmp_path, ALL).curves)
    assert set(found) == set(events.Tags()["scalars"])
    for tag, own in found.items():
        assert {e.step: e.value for e in events.Scalars(tag)} == {s: np.float32(v) for s, v in own.items()}
    assert found["stationarity"][12] == 1 / 12 + 8  # written again after the checkpoint


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_last_line_that_is_cut_anywhere_is_left_out_without_a_word(tmp_path, cut):
    written(tmp_path, range(1, 4), a=float)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-cut])
    reading = read_run(tmp_path, ALL)
    lines = [json.loads(line) for line in whole[:-cut].splitlines() if line.endswith(b"}")]
    assert points(reading.curves) == {"a": {line["step"]: line["a"] for line in lines}}
    assert reading.skipped == ()


@pytest.mark.parametrize(
    "damage",
    [b"\0\0\0", b'{"step": 2, "a": ', b"[1, 2]", b'{"a": 1.0}', b'{"step": "2"}', b'{"step": %d}' % 2**63, b"\xff\xfe"],
)
def test_a_damaged_line_is_reported_and_costs_itself_alone(tmp_path, damage):
    written(tmp_path, range(1, 5), a=float)
    lines = (tmp_path / FILE).read_bytes().split(b"\n")
    (tmp_path / FILE).write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
    reading = read_run(tmp_path, ALL)
    assert points(reading.curves) == {"a": {1: 1.0, 3: 3.0, 4: 4.0}}
    assert reading.skipped == (f"{FILE}: line 2 is damaged and left out",)


def test_what_is_left_out_is_counted(tmp_path):
    written(tmp_path, [1, 2, 2, 3], a=lambda s: math.nan if s == 3 else float(s), b=lambda s: "text")
    with open(tmp_path / FILE, "a") as file:
        file.write("{\n{\n{\n")
    assert read_run(tmp_path, ALL).skipped == (
        f"{FILE}: line 5 is damaged and left out",
        f"{FILE}: 2 more damaged lines are left out",
        f"{FILE}: 1 steps are written again; the last line of each counts",
        f"{FILE}: 4 values are not finite numbers and left out",
    )


def test_a_file_that_is_missing_or_empty_is_reported_and_has_no_curves(tmp_path):
    assert stamp_of(tmp_path / FILE) == NO_FILE
    assert read_run(tmp_path, ALL).skipped == (f"{FILE}: cannot be read: No such file or directory",)
    (tmp_path / FILE).touch()
    reading = read_run(tmp_path, ALL)
    assert reading.skipped == (f"{FILE}: has no lines",)
    assert reading.curves.values.shape == (0, 0)


def test_only_the_scalars_that_are_wanted_are_read(tmp_path):
    written(tmp_path, [1, 2], stationarity=float, **{"time/log": float, "alarm/x": float})
    assert read_run(tmp_path, WANTED).curves.tags == ("alarm/x", "stationarity")


@pytest.mark.parametrize("killed", [False, True])
def test_many_processes_read_what_one_does(tmp_path, monkeypatch, killed):
    folders = {str(i): tmp_path / str(i) for i in range(run_curves.FEW + 2)}
    for i, folder in enumerate(folders.values()):
        written(folder, range(1, 4), a=lambda s, i=i: s + i / 100)
    if killed:

        class Pool(run_curves.ProcessPoolExecutor):
            def map(self, *args, **fields):
                found = super().map(*args, **fields)
                for process in list(self._processes.values()):
                    os.kill(process.pid, signal.SIGKILL)
                return found

        monkeypatch.setattr(run_curves, "ProcessPoolExecutor", Pool)
    alone = {key: points(read_run(folder, ALL).curves) for key, folder in folders.items()}
    assert {key: points(one.curves) for key, one in read_runs(folders, ALL, 2)} == alone


def study(folder, runs=4) -> StudyCurves:
    folders = {str(i): folder / str(i) for i in range(runs)}
    return StudyCurves(folders, {"even": ["0", "2"], "odd": ["1", "3"]}, folder / "skipped.json")


def test_a_run_that_did_not_change_is_reported_without_being_read(tmp_path, monkeypatch):
    for i in range(4):
        written(tmp_path / str(i), [1], stationarity=float)
    (tmp_path / "1" / FILE).write_text("damage\n" + json.dumps({"step": 1}) + "\n")
    skipped = study(tmp_path).skipped()
    assert list(skipped) == ["1"]
    read = []
    original = run_curves.read_run
    monkeypatch.setattr(
        run_curves, "read_run", lambda folder, wanted: read.append(folder.name) or original(folder, wanted)
    )
    assert study(tmp_path).skipped() == skipped
    assert read == []
    written(tmp_path / "2", [2], stationarity=float)
    assert study(tmp_path).skipped() == skipped
    assert read == ["2"]
    (tmp_path / "skipped.json").write_text("{")  # lost: found again
    assert study(tmp_path).skipped() == skipped


def test_the_average_of_a_run_that_shrank_forgets_what_was_cut(tmp_path):
    for i in range(4):
        written(tmp_path / str(i), range(1, 5), stationarity=float, other=float)
    assert study(tmp_path).averages(["odd"])["odd"]["stationarity"].steps.tolist() == [1, 2, 3, 4]
    before = study(tmp_path).stamps_of("odd")
    for i in (1, 3):
        text = (tmp_path / str(i) / FILE).read_text().splitlines(keepends=True)
        (tmp_path / str(i) / FILE).write_text("".join(text[:2]))
    assert study(tmp_path).stamps_of("odd") != before
    found = study(tmp_path).averages(["odd"])["odd"]
    assert found["stationarity"].steps.tolist() == [1, 2]
    assert set(found) == {"stationarity"}  # a study averages what the list of curves says
