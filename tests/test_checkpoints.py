"""Laws of checkpoints: complete or absent, the last few are kept, damage is passed over, and no code is ever unpickled."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.logs import warnings_logged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_c2g.errors import UserError
from hpc_c2g.training.checkpoints import META, STATE, Checkpoints
from hpc_c2g.training.config.train import CheckpointConfig


def state(step: int, size: int = 100) -> dict:
    weights = torch.arange(size, dtype=torch.float32) + step
    return {"engine": {"w": weights, "half": weights.bfloat16()}, "scale": {"alpha": 0.1 * step}, "names": ["a", "b"]}


def new_checkpoints(folder: Path) -> Checkpoints:
    """Checkpoints in a new folder, with step 1 published."""
    made = Checkpoints(folder / "checkpoints", CheckpointConfig(every=10, keep=3))
    made.publish(1, state(1))
    return made


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return new_checkpoints(tmp_path)


def assert_newest(checkpoints: Checkpoints, step: int) -> None:
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.step == step
    assert newest.path == checkpoints.folder / f"step_{step:08d}"
    assert newest.state.keys() == state(step).keys()
    for name, tensor in state(step)["engine"].items():
        assert torch.equal(newest.state["engine"][name], tensor)
        assert newest.state["engine"][name].dtype == tensor.dtype
    assert newest.state["scale"] == {"alpha": 0.1 * step}


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(p.name for p in checkpoints.folder.iterdir())


def test_what_is_published_is_read_back(checkpoints):
    assert_newest(checkpoints, 1)


def test_without_checkpoints_there_is_no_latest(tmp_path):
    absent = Checkpoints(tmp_path / "absent", CheckpointConfig())
    assert absent.latest() is None
    assert absent.steps() == []


def test_names_that_are_no_checkpoints_are_ignored(checkpoints):
    for name in ("step_final", ".step_00000009.7.tmp", "notes"):
        (checkpoints.folder / name).mkdir()
    assert checkpoints.steps() == [1]
    assert_newest(checkpoints, 1)


def test_due_every_so_many_steps_and_after_the_last():
    checkpoints = Checkpoints(Path(), CheckpointConfig(every=4))
    assert [step for step in range(1, 11) if checkpoints.due(step, 10)] == [4, 8, 10]


def test_the_last_few_are_kept(subtests, tmp_path):
    for keep in [1, 2, 5]:
        with subtests.test(f"{keep=}"):
            checkpoints = Checkpoints(tmp_path / str(keep), CheckpointConfig(keep=keep))
            for step in range(8, 13):  # across a change in the number of digits
                checkpoints.publish(step, state(step))
            assert checkpoints.steps() == list(range(8, 13))[-keep:]
            assert_newest(checkpoints, 12)


def test_a_step_published_again_replaces_the_old_one(checkpoints):
    checkpoints.publish(2, state(7))
    checkpoints.publish(2, state(2))
    assert_newest(checkpoints, 2)


REFUSALS = list(product(["replace", "fsync"], [errno.ENOSPC, errno.EROFS]))


def test_a_refusing_file_system_leaves_the_earlier_checkpoint_and_nothing_else(subtests, monkeypatch, tmp_path):
    def check(checkpoints, patch, failing, code):
        def refuse(*_):
            raise OSError(code, os.strerror(code))

        patch.setattr(os, failing, refuse)
        with pytest.raises(UserError) as caught:
            checkpoints.publish(2, state(2))
        assert str(checkpoints.folder / "step_00000002") in caught.value.problem
        assert os.strerror(code) in caught.value.problem
        assert names(checkpoints) == ["step_00000001"]
        assert_newest(checkpoints, 1)

    for i, (failing, code) in enumerate(REFUSALS):
        with subtests.test(f"{failing} {errno.errorcode[code]}"), monkeypatch.context() as patch:
            check(new_checkpoints(tmp_path / str(i)), patch, failing, code)


def test_killed_while_writing_the_earlier_checkpoint_stays_and_the_rest_is_swept_up_later(
    subtests, tmp_path, monkeypatch
):
    def check(folder, at, keep):
        checkpoints = Checkpoints(folder, CheckpointConfig(keep=keep))
        checkpoints.publish(1, state(1))
        calls = iter(range(1, 100))

        def kill(_):
            if next(calls) == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", kill)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.publish(2, state(2))
        assert checkpoints.steps() == [1]
        assert_newest(checkpoints, 1)
        checkpoints.publish(3, state(3))
        assert names(checkpoints) == ["step_00000001", "step_00000003"][-keep:]

    for (place, at), keep in product({"in the state": 1, "in the checksum": 2}.items(), [1, 3]):
        with subtests.test(f"{place} {keep=}"):
            check(tmp_path / f"{at}_{keep}", at, keep)


CHILD = """
import os, resource, signal, sys
from pathlib import Path
import torch
from hpc_c2g.errors import UserError
from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config.train import CheckpointConfig

checkpoints = Checkpoints(Path(sys.argv[1]), CheckpointConfig(keep=3))
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
try:
    checkpoints.publish(2, {"w": torch.zeros(100_000)})
except UserError as error:
    print(error)
print(sorted(os.listdir(sys.argv[1])), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.publish(3, {"w": torch.zeros(100_000)})
"""


def test_a_file_size_limit_and_a_real_kill_leave_the_earlier_checkpoint(checkpoints):
    folder = checkpoints.folder
    child = subprocess.run([sys.executable, "-c", CHILD, folder], capture_output=True, text=True, timeout=120)
    message, listing = child.stdout.splitlines()
    assert f"cannot write {folder / 'step_00000002'}: {os.strerror(errno.EFBIG)}" in message
    assert listing == "['step_00000001']"
    assert child.returncode == -signal.SIGKILL
    assert len(names(checkpoints)) == 2  # the dead process's own, under a name that is no checkpoint's
    assert_newest(checkpoints, 1)
    checkpoints.publish(3, state(3))
    assert names(checkpoints) == ["step_00000001", "step_00000003"]
    assert_newest(checkpoints, 3)


def with_checksum(folder: Path, blob: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE).write_bytes(blob)
    meta = {"step": 2, "sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    (folder / META).write_text(json.dumps(meta))


DAMAGE = {
    "state cut in half": lambda f: (f / STATE).write_bytes((f / STATE).read_bytes()[:700]),
    "state emptied": lambda f: (f / STATE).write_bytes(b""),
    "state longer": lambda f: (f / STATE).write_bytes((f / STATE).read_bytes() + b"\0"),
    "state missing": lambda f: (f / STATE).unlink(),
    "checksum missing": lambda f: (f / META).unlink(),
    "checksum file emptied": lambda f: (f / META).write_text(""),
    "checksum file of another kind": lambda f: (f / META).write_text("[1]"),
    "checksum file without checksum": lambda f: (f / META).write_text('{"step": 2}'),
    "no archive, right checksum": lambda f: with_checksum(f, b"garbage"),
    "nothing, right checksum": lambda f: with_checksum(f, b""),
    "half an archive, right checksum": lambda f: with_checksum(f, (f / STATE).read_bytes()[:700]),
}


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(subtests, tmp_path):
    for i, (kind, damage) in enumerate(DAMAGE.items()):
        with subtests.test(kind):
            checkpoints = new_checkpoints(tmp_path / str(i))
            checkpoints.publish(2, state(2))
            damage(checkpoints.folder / "step_00000002")
            with warnings_logged("step_00000002 is damaged"):
                assert_newest(checkpoints, 1)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_of_the_state_is_detected(checkpoints, data):
    checkpoints.publish(2, state(2))
    file = checkpoints.folder / "step_00000002" / STATE
    blob = bytearray(file.read_bytes())
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(blob)
    with warnings_logged("checksum mismatch"):
        assert_newest(checkpoints, 1)


def test_all_damaged_is_an_error_that_names_the_folder(checkpoints):
    checkpoints.publish(2, state(2))
    for step in (1, 2):
        DAMAGE["state cut in half"](checkpoints.folder / f"step_{step:08d}")
    with (
        warnings_logged("is damaged") as warned,
        pytest.raises(UserError, match="every checkpoint in") as caught,
    ):
        checkpoints.latest()
    assert str(checkpoints.folder) in caught.value.problem
    assert len(warned) == 2


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("archive", [True, False], ids=["torch archive", "bare pickle"])
def test_a_malicious_pickle_with_a_right_checksum_is_refused_and_not_run(checkpoints, tmp_path, archive):
    content = {"engine": Evil(tmp_path / "owned")}
    buffer = io.BytesIO()
    if archive:
        torch.save(content, buffer)
    else:
        pickle.dump(content, buffer, protocol=2)
    with_checksum(checkpoints.folder / "step_00000002", buffer.getvalue())
    with warnings_logged("step_00000002 is damaged"):
        assert_newest(checkpoints, 1)
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(content))  # the trap itself works
    assert (tmp_path / "owned").exists()
