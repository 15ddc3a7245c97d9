"""Laws of a lease: one owner at a time, whatever happens to processes, clocks and the file system."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_c2g import lease as module
from hpc_c2g.errors import UserError
from hpc_c2g.lease import EXIT_LEASE_LOST, KEPT, MARGIN, Holder, Lease, live_holder

HOST, BOOT, NAMESPACE = module._here()
NEVER = {"every": 1000.0, "expires": 3000.0}
"""No renewal and no expiry while a test runs."""


def by_hand(folder: Path, epoch: int = 1, **changes: object) -> Path:
    """The lease of a process on another host."""
    values = {"text": "job 7 on far", "job": "7", "host": "far", "boot": "b", "namespace": "n", "pid": 5, "started": 9}
    file = folder / "leases" / f"{epoch:012d}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values | {"expires": 10.0, "token": "t"} | changes))
    return file


def epochs(folder: Path) -> list[int]:
    return sorted(int(file.name) for file in (folder / "leases").iterdir() if file.name.isdecimal())


class World:
    """Time that passes only by sleeping, and a file server of that time; the wall clock of this host must not be asked."""

    def __init__(self, patch: pytest.MonkeyPatch, skew: float = 0.0) -> None:
        self.now, self.skew, self.touches, self.utime = 1e6, skew, itertools.count(), os.utime
        self.while_asleep = lambda: None
        patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        patch.setattr(module.os, "utime", self.touch)
        patch.setattr(Lease, "_keep", lambda self, stop: None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.while_asleep()

    def touch(self, path: Path, times: None = None, ns: tuple[int, int] | None = None, skew: float = 0.0) -> None:
        stamp = int((self.now + skew) * 1e9) + next(self.touches)
        self.utime(path, ns=ns or (stamp, stamp))


@pytest.fixture
def world(monkeypatch) -> World:
    return World(monkeypatch)


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()


RACER = """
import os, random, sys, time
from pathlib import Path
from hpc_c2g.lease import Lease
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.stdin.readline()
for i in range(rounds):
    with Lease(folder, every=0.2, expires=20).acquire(wait=200) as lease:
        os.write(log, f"enter {os.getpid()} {lease.epoch}\\n".encode())
        time.sleep(random.random() / 100)
        assert lease.still_mine()
        os.write(log, f"leave {os.getpid()} {lease.epoch}\\n".encode())
        if i == rounds - 1:
            os._exit(0)  # as killed: nothing is released
"""


def test_of_many_processes_one_holds_at_a_time_also_when_each_dies_as_the_holder(tmp_path):
    processes, rounds = 8, 15
    command = [sys.executable, "-c", RACER, str(tmp_path), str(rounds)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(processes)]
    for racer in racers:
        racer.stdin.close()
    assert [racer.wait(timeout=120) for racer in racers] == [0] * processes
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == 2 * processes * rounds
    for enter, leave in zip(lines[::2], lines[1::2], strict=True):
        assert (enter[0], leave[0]) == ("enter", "leave")
        assert enter[1:] == leave[1:]
    held = [int(enter[2]) for enter in lines[::2]]
    assert held == sorted(set(held))
    assert epochs(tmp_path) == list(range(held[-1] - KEPT, held[-1] + 1))
    assert list((tmp_path / "leases").glob(".*")) == []


HOLDER = """
import sys
from pathlib import Path
from hpc_c2g.lease import Lease
with Lease(Path(sys.argv[1]), job="12_3", every=float(sys.argv[2]), expires=float(sys.argv[3])) as lease:
    print("held", flush=True)
    for line in sys.stdin:
        print(lease.still_mine(), lease.epoch, flush=True)
"""


def test_a_holder_killed_on_this_host_is_replaced_at_once_and_before_that_it_is_named(tmp_path):
    with process(HOLDER, tmp_path, 1000, 3000) as holder:
        assert holder.stdout.readline() == "held\n"
        assert live_holder(tmp_path).pid == holder.pid
        with pytest.raises(UserError) as caught:
            Lease(tmp_path).acquire()
        name = f"job 12_3 on {HOST}, process {holder.pid}"
        assert caught.value.problem == f"{tmp_path} is in use by {name}"
        assert caught.value.hint == "wait for it, cancel that job, or choose another folder"
        holder.send_signal(signal.SIGKILL)
        while module._started(holder.pid) != -1:  # dying; nobody has asked for its exit status
            time.sleep(0.01)
        assert live_holder(tmp_path) is None
        with Lease(tmp_path) as lease:
            assert lease.epoch == 2


def test_a_stopped_holder_that_was_replaced_ends_when_it_comes_back_and_may_not_publish(tmp_path):
    with process(HOLDER, tmp_path, 0.1, 1) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        with Lease(tmp_path, **NEVER).acquire(wait=60) as lease:
            holder.stdin.write("publish\n" * 3)
            holder.stdin.flush()
            holder.send_signal(signal.SIGCONT)
            assert holder.wait(timeout=60) == EXIT_LEASE_LOST
            assert "True" not in holder.stdout.read()
            assert "was taken over" in holder.stderr.read()
            assert lease.still_mine()
            assert live_holder(tmp_path).epoch == lease.epoch


def test_a_stopped_holder_that_nobody_replaced_goes_on_under_a_new_epoch(tmp_path):
    with process(HOLDER, tmp_path, 0.25, 0.5) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        time.sleep(1)
        holder.send_signal(signal.SIGCONT)
        holder.stdin.write("publish\n")
        holder.stdin.flush()
        assert holder.stdout.readline().startswith("True")
        assert epochs(tmp_path)[-1] > 1


def test_a_thread_renews_while_the_holder_works(tmp_path):
    with Lease(tmp_path, every=0.2, expires=20) as lease:
        before = module._read_highest(tmp_path / "leases", 1)
        while module._read_highest(tmp_path / "leases", 1) == before:
            time.sleep(0.01)
        assert lease.still_mine()


def test_release_frees_at_once_and_twice_is_once(tmp_path):
    first = Lease(tmp_path, **NEVER)
    for epoch in (1, 2):
        assert first.acquire().epoch == epoch
        first.release()
        assert not first.still_mine()
        assert live_holder(tmp_path) is None
    with Lease(tmp_path) as second:
        first.release()
        assert second.epoch == 3
        assert second.still_mine()


def test_one_process_is_refused_a_second_time_and_the_first_lease_stays(tmp_path):
    with Lease(tmp_path, "the first", **NEVER) as first:
        for again in (first, Lease(tmp_path)):
            with pytest.raises(UserError, match="is in use by the first"):
                again.acquire()
        assert first.still_mine()


def test_a_fork_holds_nothing_and_takes_nothing_away(tmp_path):
    with Lease(tmp_path, **NEVER) as lease:
        child = os.fork()
        if child == 0:
            try:
                held = lease.still_mine()
                lease.release()
                os._exit(1 if held else 0)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert live_holder(tmp_path).pid == os.getpid()
        assert lease.still_mine()


def test_a_holder_on_another_host_is_respected_while_it_renews_and_replaced_after_its_silence(tmp_path, world):
    file = by_hand(tmp_path, expires=10.0)
    world.touch(file)
    last = []

    def renew() -> None:
        if world.now < 1e6 + 100:
            world.touch(file)
            last[:] = [world.now]

    world.while_asleep = renew
    with pytest.raises(UserError, match="is in use by job 7 on far"):
        Lease(tmp_path, expires=500.0).acquire(wait=60)
    assert Lease(tmp_path).acquire(wait=60).epoch == 2
    assert world.now > last[0] + 10


def test_clocks_of_hosts_that_differ_by_hours_change_no_decision(subtests, tmp_path, monkeypatch):
    """As on Lustre, where a touch may carry the time of the host that made it."""

    def check(world: World, folder: Path, skew: float):
        file = by_hand(folder)
        world.touch(file, skew=skew)
        world.while_asleep = lambda: world.touch(file, skew=skew)
        for wait in (0, 60):
            with pytest.raises(UserError, match="is in use"):
                Lease(folder).acquire(wait)
        world.while_asleep = lambda: None
        before = world.now
        assert Lease(folder).acquire(wait=0).epoch == 2
        assert world.now >= before + 10 * MARGIN

    for i, skew in enumerate([-7200.0, 7200.0]):
        with subtests.test(f"{skew=}"), monkeypatch.context() as patch:
            check(World(patch), tmp_path / str(i), skew)


def test_who_has_been_silent_for_long_is_watched_even_by_those_who_do_not_wait(tmp_path, world):
    world.touch(by_hand(tmp_path))
    with pytest.raises(UserError):
        Lease(tmp_path).acquire()
    assert world.now == 1e6
    world.now += 11
    assert live_holder(tmp_path) is None
    assert Lease(tmp_path).acquire().epoch == 2


def test_a_silent_owner_and_its_watcher_are_decided_by_the_link(tmp_path, world):
    first, second = Lease(tmp_path, every=5.0, expires=10.0), Lease(tmp_path, every=5.0, expires=10.0)
    first.acquire()
    back: list[bool] = []

    def come_back() -> None:
        if world.now > 1e6 + 10.5 and not back:
            back.append(first.still_mine())

    world.while_asleep = come_back
    with pytest.raises(UserError):
        second.acquire(wait=15)
    assert back == [True]
    assert first.epoch == 2
    assert second.acquire(wait=15).epoch == 3
    assert not first.still_mine()


def test_the_wall_clock_decides_nothing_where_the_file_system_can_be_asked(tmp_path, monkeypatch):
    world = World(monkeypatch)
    world.touch(by_hand(tmp_path))
    assert live_holder(tmp_path).text == "job 7 on far"  # this world has no wall clock to ask
    world.now += 11
    assert live_holder(tmp_path) is None


def test_a_read_only_folder_tells_its_holder_by_the_local_clock(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    file = by_hand(tmp_path, expires=100.0)
    monkeypatch.setattr(Path, "touch", refuse)
    assert live_holder(tmp_path) == Holder(1, "job 7 on far", "7", "far", "b", "n", 5, 9, 100.0, "t")
    os.utime(file, (time.time() - 200,) * 2)
    assert live_holder(tmp_path) is None


UNREADABLE = [
    b"",
    b'{"text": "job 7 on f',
    b"\xff\xfe\x00",
    b"[" * 70000,
    b"null",
    b"[1]",
    b'{"text": 1}',
    json.dumps({"text": "x", "job": None, "host": HOST, "boot": BOOT, "namespace": NAMESPACE}).encode(),
    *(
        json.dumps(
            {"text": "x", "job": None, "host": HOST, "boot": BOOT, "namespace": NAMESPACE, "token": ""} | bad
        ).encode()
        for bad in (
            {"pid": -1, "started": 1, "expires": 1},
            {"pid": 1, "started": 1, "expires": float("nan")},
            {"pid": float("inf"), "started": 1, "expires": 1},
            {"pid": [], "started": 1, "expires": 1},
        )
    ),
]


def test_a_lease_that_cannot_be_read_is_respected_until_it_was_silent(subtests, tmp_path, monkeypatch):
    for i, content in enumerate(UNREADABLE):
        with subtests.test(repr(content[:20])), monkeypatch.context() as patch:
            world, folder = World(patch), tmp_path / str(i)
            file = by_hand(folder, 3)
            file.write_bytes(content)
            world.touch(file)
            assert live_holder(folder) == Holder(3)
            with pytest.raises(UserError, match="is in use by an unknown process"):
                Lease(folder, expires=10.0).acquire()
            assert Lease(folder, expires=10.0).acquire(wait=20).epoch == 4


def test_foreign_files_and_missing_folders_are_nobody(tmp_path):
    assert live_holder(tmp_path / "missing") is None
    (tmp_path / "file").write_text("")
    assert live_holder(tmp_path / "file") is None
    leases = tmp_path / "leases"
    leases.mkdir()
    assert live_holder(tmp_path) is None
    for name in ("README", ".nfs0001", "7", "0000000000012", "-00000000001", "00000000001٣"):
        (leases / name).write_text("x")
    assert live_holder(tmp_path) is None
    with Lease(tmp_path, **NEVER) as lease:
        assert lease.epoch == 1
        (leases / "000000000002").mkdir()
        assert live_holder(tmp_path) == Holder(0)
        with pytest.raises(UserError, match="cannot write"):
            Lease(tmp_path).acquire()


HOLDERS = [
    ({}, False),
    ({"started": 1}, True),
    ({"pid": 2**22 + 1}, True),
    ({"pid": 2**70}, False),
    ({"pid": 2**22 + 1, "namespace": "pid:[1]"}, False),
    ({"started": 1, "namespace": "pid:[1]"}, False),
    ({"pid": 2**22 + 1, "boot": "before"}, False),
    ({"pid": 2**22 + 1, "host": "far"}, False),
]


def test_only_the_same_process_of_the_same_host_boot_and_namespace_is_known_to_live_or_not(
    subtests, tmp_path, monkeypatch
):
    for i, (changes, known_dead) in enumerate(HOLDERS):
        with subtests.test(str(changes)), monkeypatch.context() as patch:
            world, folder = World(patch), tmp_path / str(i)
            here = {"host": HOST, "boot": BOOT, "namespace": NAMESPACE, "pid": os.getpid()}
            world.touch(by_hand(folder, **(here | {"started": module._started(os.getpid())} | changes)))
            assert (live_holder(folder) is None) == known_dead
            if known_dead:
                assert Lease(folder).acquire().epoch == 2
            else:
                with pytest.raises(UserError, match="is in use"):
                    Lease(folder).acquire()


def test_where_proc_tells_nothing_no_process_is_known_to_be_dead(tmp_path, world, monkeypatch):
    monkeypatch.setattr(module, "_here", lambda: (HOST, "", ""))
    world.touch(by_hand(tmp_path, host=HOST, boot="", namespace="", pid=2**22 + 1))
    with pytest.raises(UserError, match="is in use"):
        Lease(tmp_path).acquire()


@pytest.mark.parametrize("error", [FileExistsError(errno.EEXIST, "exists"), OSError(errno.EIO, "io")], ids=repr)
def test_a_link_whose_reply_was_lost_counts(tmp_path, monkeypatch, error):
    link = os.link

    def lose_the_reply(*arguments: Path) -> None:
        link(*arguments)
        raise error

    monkeypatch.setattr(os, "link", lose_the_reply)
    with Lease(tmp_path, **NEVER) as lease:
        assert epochs(tmp_path) == [lease.epoch] == [1]
        assert lease.still_mine()


def test_a_claimant_that_stalled_while_epochs_came_and_went_has_not_won(tmp_path, world, monkeypatch):
    file, link = by_hand(tmp_path, 4), os.link
    world.utime(file, ns=(0, 0))

    def stall(*arguments: Path) -> None:
        file.unlink()
        world.touch(by_hand(tmp_path, 30))
        link(*arguments)

    monkeypatch.setattr(os, "link", stall)
    with pytest.raises(UserError, match="is in use by job 7 on far"):
        Lease(tmp_path).acquire()
    assert live_holder(tmp_path).epoch == 30


def test_errors_of_the_file_system_are_forgiven_for_a_while(tmp_path, world, monkeypatch):
    lease, look = Lease(tmp_path, every=5.0, expires=10.0).acquire(), module._read_highest

    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, "stale")

    for _ in range(3):  # every success starts a new while
        monkeypatch.setattr(module, "_read_highest", fail)
        world.now += 9
        assert lease.still_mine()
        monkeypatch.setattr(module, "_read_highest", look)
        assert lease.still_mine()
    monkeypatch.setattr(module, "_read_highest", fail)
    world.now += 11
    assert not lease.still_mine()
    monkeypatch.setattr(module, "_read_highest", look)
    assert not lease.still_mine()


def test_a_renewal_counts_from_its_start_and_one_that_hung_takes_a_new_epoch(tmp_path, world, monkeypatch):
    lease, touch, seconds = Lease(tmp_path, every=5.0, expires=10.0).acquire(), os.utime, 4.0

    def hang(path: Path) -> None:
        touch(path)
        world.now += seconds

    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr(os, "utime", hang)
    assert lease.still_mine()
    assert lease.epoch == 1
    seconds = 12.0  # others may have judged in the meantime
    assert lease.still_mine()
    assert lease.epoch == 2
    seconds = 4.0
    assert lease.still_mine()
    monkeypatch.setattr(module, "_read_highest", fail)
    world.now += 7
    assert not lease.still_mine()


@pytest.mark.parametrize("removed", ["", "leases"])
def test_a_holder_whose_folder_vanishes_for_long_is_told_once(tmp_path, removed):
    told = []
    lost = threading.Event()
    folder = tmp_path / "run"
    lease = Lease(folder, every=0.05, expires=0.2, on_lost=lambda: (told.append(1), lost.set())).acquire()
    shutil.rmtree(folder / removed)
    assert lost.wait(60)
    assert not lease.still_mine()
    lease.release()
    assert told == [1]


@pytest.mark.parametrize("asked", [True, False])
def test_a_lease_removed_or_made_anew_under_the_same_number_is_lost(tmp_path, asked):
    first, second = Lease(tmp_path, **NEVER).acquire(), Lease(tmp_path, **NEVER)
    shutil.rmtree(tmp_path / "leases")
    assert second.acquire().epoch == first.epoch
    if asked:
        assert not first.still_mine()
    first.release()
    assert live_holder(tmp_path).token == second._token
    assert second.still_mine()
    (tmp_path / "leases" / "000000000001").unlink()
    assert not second.still_mine()


def test_a_change_of_directory_moves_no_lease(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Lease(Path("run"), **NEVER) as lease:
        monkeypatch.chdir("/")
        assert lease.still_mine()
    assert live_holder(tmp_path / "run") is None


REFUSALS = list(
    itertools.product(
        [(Path, "mkdir"), (Path, "write_text"), (os, "link"), (os, "utime")], [errno.EACCES, errno.ENOSPC, errno.EROFS]
    )
)


def test_a_folder_that_cannot_be_written_is_named(subtests, tmp_path, monkeypatch):
    def check(folder: Path, owner: object, call: str, number: int):
        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(owner, call, refuse)
            with pytest.raises(UserError) as caught:
                Lease(folder).acquire()
        assert caught.value.problem == f"cannot write {folder / 'leases'}: {os.strerror(number)}"
        assert live_holder(folder) is None

    for i, ((owner, call), number) in enumerate(REFUSALS):
        with subtests.test(f"{call} {errno.errorcode[number]}"):
            folder = tmp_path / str(i)
            folder.mkdir()
            check(folder, owner, call, number)


def test_what_killed_claimants_left_is_removed_and_what_live_ones_need_is_not(tmp_path):
    leases = tmp_path / "leases"
    leases.mkdir()
    for name in (".old.tmp", ".new.tmp", "README"):
        (leases / name).write_text("")
    for name in (".old.tmp", "README"):
        os.utime(leases / name, (time.time() - 2 * module.UNUSED,) * 2)
    with Lease(tmp_path, **NEVER):
        assert sorted(os.listdir(leases)) == [".new.tmp", "000000000001", "README"]


def test_times_that_make_no_sense_are_named(subtests, tmp_path):
    for every, expires in [(0, 1), (1, 1.5), (5, float("inf")), (-1, 30), (float("nan"), 30)]:
        with subtests.test(f"{every=} {expires=}"), pytest.raises(UserError, match="every="):
            Lease(tmp_path, every=every, expires=expires)


def test_a_lease_released_while_it_is_renewed_is_not_lost(tmp_path, monkeypatch):
    told: list[int] = []
    lease = Lease(tmp_path, every=0.01, expires=20, on_lost=lambda: told.append(1))
    monkeypatch.setattr(Lease, "still_mine", lambda self: bool(self.release()))
    lease.acquire()
    while renewing(tmp_path):
        time.sleep(0.01)
    assert told == []


def test_a_lease_acquired_again_is_renewed_by_one_thread(tmp_path):
    lease = Lease(tmp_path, every=0.2, expires=20, on_lost=lambda: None).acquire()
    (tmp_path / "leases" / "000000000001").unlink()
    assert not lease.still_mine()
    with lease.acquire():
        while len(renewing(tmp_path)) > 1:
            time.sleep(0.01)
        assert lease.still_mine()


def renewing(folder: Path) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"lease of {folder}"]


ACTORS, EXPIRES = 3, 10.0
ACTIONS = st.lists(st.sampled_from(["claim and wait", "check", "claim", "release"]), min_size=2, max_size=6)
TURN = st.tuples(st.integers(0, ACTORS - 1), st.integers(1, 9), st.sampled_from([0.0, 0.0, 0.0, 5.0, 12.0]))


@settings(max_examples=50, deadline=None)
@given(
    scripts=st.lists(ACTIONS, min_size=ACTORS, max_size=ACTORS),
    turns=st.lists(TURN, min_size=10, max_size=40),
    kept=st.sampled_from([0, KEPT]),
)
def test_in_any_interleaving_at_most_one_trusts_its_lease_and_epochs_only_grow(scripts, turns, kept):
    """Each actor is a thread that stops before every look and link and after every touch; a turn lets one run some stretches."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        world, trusted, won, faults = World(patch), [-1.0] * ACTORS, [0], []
        wake, back = [threading.Semaphore(0) for _ in range(ACTORS)], threading.Semaphore(0)
        me = threading.local()

        def pause() -> None:
            if hasattr(me, "number"):  # a thread that renews is none of the actors
                back.release()
                wake[me.number].acquire()

        def pausing(call, before: bool):
            def wrapper(*arguments, **options):
                if before:
                    pause()
                result = call(*arguments, **options)
                if not before:
                    pause()
                return result

            return wrapper

        def sleep(seconds: float) -> None:
            pause()
            world.now += 6.0  # oversleeps

        def play(number: int) -> None:
            me.number = number
            wake[number].acquire()
            try:
                lease = Lease(Path(folder), every=EXPIRES / 2, expires=EXPIRES)
                for action in scripts[number]:
                    act(number, action, lease)
                    pause()
            except BaseException as fault:
                faults.append(fault)
            alive.discard(number)
            back.release()

        def act(number: int, action: str, lease: Lease) -> None:
            epoch = lease.epoch
            if action == "release":
                trusted[number] = -1.0
                lease.release()
                return
            try:
                mine = lease.still_mine() if action == "check" else bool(lease.acquire(25.0 if "wait" in action else 0))
            except UserError:
                return
            trusted[number] = lease._renewed + EXPIRES if mine else -1.0
            assert sum(until >= world.now for until in trusted) <= 1, (number, action, trusted, world.now)
            if mine and (action != "check" or lease.epoch != epoch):
                assert lease.epoch > won[-1]
                won.append(lease.epoch)

        patch.setattr(module, "KEPT", kept)
        patch.setattr(module, "_read_highest", pausing(module._read_highest, before=True))
        patch.setattr(os, "link", pausing(os.link, before=True))
        patch.setattr(os, "utime", pausing(world.touch, before=False))
        patch.setattr(module.time, "sleep", sleep)
        alive = set(range(ACTORS))
        for number in range(ACTORS):
            threading.Thread(target=play, args=(number,), daemon=True).start()
        turns = [*turns]
        while alive:
            number, stretches, passes = turns.pop(0) if turns else (min(alive), 1, 1.0)
            world.now += passes
            for _ in range(stretches):
                if number in alive:
                    wake[number].release()
                    back.acquire()
        assert faults == []
