"""Laws of checkpoints written by a thread: the state of the call, one at a time, nothing lost in silence."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hpc_c2g.errors import UserError
from hpc_c2g.training.checkpoints import META, STATE, Checkpoints, snapshot
from hpc_c2g.training.config.train import CheckpointConfig


def state(step: int) -> dict:
    whole = torch.arange(1000, dtype=torch.float32) + step
    weights = OrderedDict(w=whole, part=whole[10:20], turned=whole.view(50, 20).t(), half=whole.bfloat16())
    weights._metadata = {"version": 1}  # as a module's state_dict has it
    return {"engine": weights, "scale": {"alpha": 0.1 * step, "all": [step, None]}, "empty": torch.empty(0)}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """With step 1 published."""
    made = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=5))
    made.publish(1, state(1))
    return made


class SlowDisk:
    """The first fsync of each checkpoint waits until ``go``; counts how many threads write."""

    def __init__(self) -> None:
        self.go, self.waiting, self.writers = threading.Event(), threading.Event(), set()
        self._fsync = os.fsync

    def fsync(self, handle: int) -> None:
        self.writers.add(threading.get_ident())
        self.waiting.set()
        assert self.go.wait(30)
        self._fsync(handle)


@pytest.fixture
def slow_disk(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    yield disk
    disk.go.set()
    checkpoints.finish()


def files(checkpoints: Checkpoints, step: int) -> list[bytes]:
    return [(checkpoints.folder / f"step_{step:08d}" / name).read_bytes() for name in (STATE, META)]


def test_the_same_bytes_as_at_once(checkpoints: Checkpoints) -> None:
    checkpoints.publish(2, state(2))
    at_once = files(checkpoints, 2)
    checkpoints.publish_later(2, state(2))
    checkpoints.finish()
    assert files(checkpoints, 2) == at_once


def test_what_training_changes_afterwards_is_not_in_it(checkpoints: Checkpoints, slow_disk: SlowDisk) -> None:
    changing = state(2)
    checkpoints.publish_later(2, changing)
    changing["engine"]["w"].zero_()
    changing["engine"]["half"].add_(1)
    changing["scale"]["all"].append("more")
    changing["scale"]["alpha"] = 0.0
    slow_disk.go.set()
    checkpoints.finish()
    written = checkpoints.at(2).state
    for name, tensor in state(2)["engine"].items():
        assert torch.equal(written["engine"][name], tensor)
    assert written["scale"] == state(2)["scale"]


def test_a_snapshot_shares_nothing_with_the_state() -> None:
    original = state(2)
    copy = snapshot(original)
    assert original["engine"]["w"].untyped_storage().data_ptr() != copy["engine"]["w"].untyped_storage().data_ptr()
    original["engine"]["w"].zero_()
    assert torch.equal(copy["engine"]["turned"], state(2)["engine"]["turned"])
    copy["engine"]["w"][10] = -1  # its tensors share with each other what the state's did
    assert float(copy["engine"]["part"][0]) == -1


def test_it_returns_before_the_checkpoint_is_there(checkpoints: Checkpoints, slow_disk: SlowDisk) -> None:
    checkpoints.publish_later(2, state(2))
    assert slow_disk.waiting.wait(30)
    assert checkpoints.steps() == [1]
    slow_disk.go.set()
    checkpoints.finish()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("again", ["publish", "publish_later"])
def test_the_next_one_waits_and_one_thread_writes(checkpoints: Checkpoints, slow_disk: SlowDisk, again: str) -> None:
    checkpoints.publish_later(2, state(2))
    assert slow_disk.waiting.wait(30)
    second = threading.Thread(target=getattr(checkpoints, again), args=(3, state(3)))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert len(slow_disk.writers) == 1
    slow_disk.go.set()
    second.join(30)
    assert 2 in checkpoints.steps()
    checkpoints.publish_later(4, state(4))
    checkpoints.finish()
    assert checkpoints.steps() == [1, 2, 3, 4]
    assert len(slow_disk.writers - {second.ident}) == 1
    assert threading.get_ident() not in slow_disk.writers


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def failed_write(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        checkpoints.publish_later(2, state(2))
        time.sleep(0.01)
        while not checkpoints._pending.done():
            time.sleep(0.01)


@pytest.mark.parametrize("call", ["publish", "publish_later", "finish"])
def test_its_failure_is_told_once_by_the_next_call(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    failed_write(checkpoints, monkeypatch)
    with pytest.raises(UserError, match=r"cannot write \S+step_00000002: No space left on device"):
        getattr(checkpoints, call)(*(() if call == "finish" else (3, state(3))))
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step_00000001"]
    checkpoints.publish_later(4, state(4))
    checkpoints.finish()
    assert checkpoints.steps() == [1, 4]


def test_a_context_tells_the_failure_unless_there_is_an_earlier_one(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(error: type[Exception] | None) -> None:
        with checkpoints:
            failed_write(checkpoints, monkeypatch)
            if error:
                raise error("power cut")

    with pytest.raises(UserError, match="cannot write"):
        leave(None)
    with pytest.raises(RuntimeError, match="power cut"):
        leave(RuntimeError)


def test_a_context_ends_what_was_begun(checkpoints: Checkpoints) -> None:
    with checkpoints:
        checkpoints.publish_later(2, state(2))
    assert checkpoints.steps() == [1, 2]


EXITS = """
import sys, torch
from pathlib import Path
from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config.train import CheckpointConfig

Checkpoints(Path(sys.argv[1]), CheckpointConfig()).publish_later(2, {"w": torch.ones(3_000_000)})
raise RuntimeError("an error that nobody caught")
"""


def test_an_interpreter_that_exits_ends_what_was_begun(checkpoints: Checkpoints) -> None:
    child = subprocess.run([sys.executable, "-c", EXITS, checkpoints.folder], capture_output=True, timeout=120)
    assert b"an error that nobody caught" in child.stderr
    assert float(checkpoints.at(2).state["w"].sum()) == 3_000_000
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step_00000001", "step_00000002"]
