"""Laws of the run's log: a line per logged step and no other, true quantiles, quiet on request, and one error for a full disk."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_c2g.errors import C2GError
from hpc_c2g.monitoring.run_log import MetricsFile, RunLog, due
from hpc_c2g.training.config import LogConfig

QUIET = LogConfig(every=4, images_every=6, progress=False)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, steps) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps))


def scalars(step: int) -> dict[str, float]:
    return {"stationarity": 1 / step, "loss": 2 / step}


def run(log: RunLog, start: int, stop: int, bands=()) -> None:
    with log:
        for step in range(start, stop):
            log.step(step, scalars(step), bands)


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


@pytest.mark.parametrize("half", ['{"step": 6, "lo', '{"step": 6, "loss": 1.0', "{", "\0\0\0"])
def test_a_half_written_line_is_dropped_wherever_it_stands(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    written(path, [2])
    with open(path, "a") as file:
        file.write(half + '\n{"step": 4, "loss": 2.0}\n' + half)
    metrics = MetricsFile(path, 100)
    metrics.write({"step": 101})
    metrics.close()
    assert [line["step"] for line in lines(path)] == [2, 4, 101]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1})
    assert [line["step"] for line in lines(metrics.path)] == [1]
    metrics.close()


def test_due_are_the_first_the_last_and_every_so_many_steps(tmp_path):
    log = RunLog(tmp_path, QUIET, steps=10, global_batch=8, resumed_step=0)
    with log:
        assert [step for step in range(1, 11) if log.due(step)] == [1, 4, 8, 10]
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


def test_quantiles_and_the_share_of_zeros_are_those_of_the_values(tmp_path):
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(501, generator=generator)
    multipliers = torch.cat([torch.zeros(30), torch.rand(70, generator=generator) + 0.1])
    run(RunLog(tmp_path, QUIET, 10, 8, 0), 1, 2, [(margins, multipliers)])
    (line,) = lines(tmp_path / "metrics.jsonl")
    for name, values in (("margins", margins), ("multipliers", multipliers)):
        for q in (5, 25, 50, 75, 95):
            assert line[f"{name}/q{q:02d}"] == pytest.approx(float(np.quantile(values.numpy(), q / 100)), abs=1e-6)
    assert line["multipliers/share_of_zeros"] == pytest.approx(0.3)


def test_quantiles_of_many_values_are_those_of_an_even_sample(tmp_path):
    run(RunLog(tmp_path, QUIET, 10, 8, 0), 1, 2, [(torch.linspace(0, 1, 20_000_000), torch.ones(1))])
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["margins/q05"] == pytest.approx(0.05, abs=1e-4)
    assert line["margins/q95"] == pytest.approx(0.95, abs=1e-4)


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
    with pytest.raises(C2GError) as caught:  # closing fails as well, and must not hide the first failure
        run(log, 1, 5)
    assert f"cannot write {tmp_path / 'metrics.jsonl'}: No space left on device" in caught.value.what


def test_a_disk_that_is_full_at_the_end_is_named(tmp_path):
    log = RunLog(tmp_path, QUIET, 10, 8, 0)
    log.metrics._file.close()
    log.metrics._file = FullDisk(log.metrics._file)
    with pytest.raises(C2GError, match=f"cannot write {tmp_path}"), log:
        pass


@pytest.mark.parametrize("what", ["add_scalar", "add_image"])
def test_tensorboard_on_a_full_disk_is_named(tmp_path, monkeypatch, what):
    log = RunLog(tmp_path, QUIET, 10, 8, 0)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log.board, what, refuse)
    call = {
        "add_scalar": lambda: log.step(1, scalars(1), []),
        "add_image": lambda: log.images(1, "samples", torch.zeros(4, 1, 2, 2), 2),
    }[what]
    with pytest.raises(C2GError, match=r"cannot write \S+tensorboard: No space left on device"), log:
        call()
