"""The law of checkpoints under faults: whatever fails or dies at whatever point, no checkpoint that was published is lost."""

from __future__ import annotations

import builtins
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forkserver import forkserver
from helpers.logs import warnings_logged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_c2g.errors import UserError
from hpc_c2g.training import checkpoints as module
from hpc_c2g.training.checkpoints import META, STATE, Checkpoints
from hpc_c2g.training.config.train import CheckpointConfig

KILLS = 30
HOW = ("publish", "publish_later")
anywhere = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def state(step: int, mark: float = 0.0) -> dict:
    """Of a size that differs from step to step."""
    weights = torch.full((1 + 37_000 * (step % 5),), float(step))
    return {"engine": {"w": weights}, "scale": {"alpha": 0.1 * step, "mark": mark}}


def publish(checkpoints: Checkpoints, how: str, step: int, mark: float = 0.0) -> None:
    getattr(checkpoints, how)(step, state(step, mark))
    checkpoints.finish()


def made(folder: Path, keep: int = 1, steps: tuple[int, ...] = (1,)) -> Checkpoints:
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=keep))
    for step in steps:
        checkpoints.publish(step, state(step))
    return checkpoints


def whole_step(checkpoints: Checkpoints, *marks: float) -> int:
    """Step of the newest checkpoint, which is whole and as it was published with one of ``marks``."""
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.state["scale"]["mark"] in (marks or (0.0,))
    expected = state(newest.step, newest.state["scale"]["mark"])
    assert torch.equal(newest.state["engine"]["w"], expected["engine"]["w"])
    assert newest.state["scale"] == expected["scale"]
    return newest.step


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(p.name for p in checkpoints.folder.iterdir())


@anywhere
@given(st.data(), st.sampled_from([STATE, META]))
def test_a_file_cut_anywhere_is_passed_over(tmp_path: Path, data: st.DataObject, name: str) -> None:
    checkpoints = made(tmp_path, keep=2, steps=(1, 5))
    file = checkpoints.at(5).path / name
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with warnings_logged("step_00000005 is damaged"):
        assert whole_step(checkpoints) == 1


@anywhere
@given(st.data())
def test_any_flipped_bit_of_the_checksum_file_is_detected(tmp_path: Path, data: st.DataObject) -> None:
    checkpoints = made(tmp_path, keep=2, steps=(1, 5))
    file = checkpoints.at(5).path / META
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with warnings_logged("step_00000005 is damaged"):
        assert whole_step(checkpoints) == 1


def test_a_damaged_later_checkpoint_does_not_crowd_out_the_one_just_written(tmp_path: Path) -> None:
    checkpoints = made(tmp_path, keep=1, steps=(1,))
    (tmp_path / "step_00000009").mkdir()
    publish(checkpoints, "publish", 2)
    with warnings_logged("step_00000009 is damaged"):
        assert whole_step(checkpoints) == 2
    publish(checkpoints, "publish", 9)
    assert names(checkpoints) == ["step_00000009"]
    assert whole_step(checkpoints) == 9


class HalfWritten:
    """A file whose write stops in the middle."""

    def __init__(self, file: Any, act: Callable[[], None]) -> None:
        self._file, self._act = file, act

    def write(self, content: Any) -> None:
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        self._act()
        self._file.write(content[len(content) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def every_call(patch: pytest.MonkeyPatch, act: Callable[[], None], removals: bool) -> None:
    """Call ``act`` before each call that changes the disk, and in the middle of each write."""

    def acting(call: Callable[..., Any]) -> Callable[..., Any]:
        def acted(*args: Any, **options: Any) -> Any:
            act()
            return call(*args, **options)

        return acted

    for name in ("mkdir", "fsync", "replace", *(("unlink", "rmdir") if removals else ())):
        patch.setattr(os, name, acting(getattr(os, name)))
    opened = acting(builtins.open)
    patch.setattr(module, "open", lambda *args: HalfWritten(opened(*args), act), raising=False)


def at_call(number: int, act: Callable[[], None]) -> Callable[[], None]:
    calls = iter(range(1, 1000))

    def counted() -> None:
        if next(calls) >= number:
            act()

    return counted


def disk_full() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "a step published again"])
@pytest.mark.parametrize("how", HOW)
def test_a_disk_that_is_full_from_any_call_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, step: int
) -> None:
    refusals = 0
    for number in range(1, 100):
        checkpoints = made(tmp_path / str(number))
        with monkeypatch.context() as patch:
            every_call(patch, at_call(number, disk_full), removals=False)
            try:
                publish(checkpoints, how, step, mark=1.0)
            except UserError as error:
                assert re.search(rf"cannot write \S+step_0000000{step}: No space left", str(error))  # noqa: PT017
                refusals += 1
            else:
                if number > refusals + 3:  # past the removals, whose failure does not matter
                    break
        assert whole_step(checkpoints, 0.0, 1.0) in (1, step)
        assert not list(checkpoints.folder.glob(".*.tmp"))
        publish(checkpoints, how, 3)
        assert names(checkpoints) == ["step_00000003"]
    assert refusals >= 9  # folder, 2 x (open, write, fsync), rename, fsync


def dies_at_call(folder: Path, number: int, how: str, step: int) -> None:
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=1))
    with pytest.MonkeyPatch.context() as patch:
        every_call(patch, at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)), removals=True)
        publish(checkpoints, how, step, mark=1.0)


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "a step published again"])
@pytest.mark.parametrize("how", HOW)
def test_killed_at_any_call(tmp_path: Path, how: str, step: int) -> None:
    for number in range(1, 100):
        checkpoints = made(tmp_path / str(number))
        child = forkserver().Process(target=dies_at_call, args=(checkpoints.folder, number, how, step))
        child.start()
        child.join(60)
        assert whole_step(checkpoints, 0.0, 1.0) in (1, step)
        assert all(checkpoints.at(published) for published in checkpoints.steps())  # also what was being removed
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        publish(checkpoints, how, 3)
        assert names(checkpoints) == ["step_00000003"]
    assert number > 12  # the calls of a publication and its removals


def test_what_was_left_aside_is_a_checkpoint_until_there_is_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = made(tmp_path)
    os.replace(tmp_path / "step_00000001", tmp_path / "step_00000001.old")  # killed between two renames
    assert whole_step(checkpoints) == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: disk_full())
        with pytest.raises(UserError):
            publish(checkpoints, "publish", 2)
    assert whole_step(checkpoints) == 1
    publish(checkpoints, "publish", 2)
    assert names(checkpoints) == ["step_00000002"]


def publishes_for_ever(folder: Path, how: str, reports: Any) -> None:
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
    newest = checkpoints.latest()
    for step in range(newest.step + 1 if newest else 1, 10**6):
        getattr(checkpoints, how)(step, state(step))
        if how == "publish_later":
            if step % 3:
                step -= 1  # this one is under way; the call told that the one before is there
            else:
                checkpoints.finish()
        reports.send_bytes(str(step).encode())
        if step % 4 == 0:
            checkpoints.publish(step, state(step))


@pytest.mark.parametrize("how", HOW)
def test_killed_at_random_moments(tmp_path: Path, how: str) -> None:
    chance = random.Random(0)
    checkpoints, reached = Checkpoints(tmp_path, CheckpointConfig(keep=2)), 0
    for _ in range(KILLS):
        reports, end = forkserver().Pipe(duplex=False)
        child = forkserver().Process(target=publishes_for_ever, args=(tmp_path, how, end))
        child.start()
        end.close()
        reported = reached
        for _ in range(4):  # it is publishing by now, however busy the machine is
            assert reports.poll(60)
            reported = int(reports.recv_bytes())
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        try:
            while True:
                reported = int(reports.recv_bytes())
        except EOFError:
            pass
        reached = whole_step(checkpoints)
        assert reached >= reported
        if chance.random() < 0.5:  # else the next child finds what this one left
            checkpoints.publish(reached + 1, state(reached + 1))
            assert all(re.fullmatch(r"step_\d{8}", name) for name in names(checkpoints))
            assert whole_step(checkpoints) == reached + 1
            reached += 1
    assert reached > 2 * KILLS
