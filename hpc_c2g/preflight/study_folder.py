"""A study's folder, as the login node sees it: room, rights, links, locks, and whether other nodes can see it at all."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically
from hpc_c2g.preflight.check_result import CheckResult
from hpc_c2g.scheduling.batch_script import check_folder

T = TypeVar("T")
PATIENCE = 60.0
MOUNTS = Path("/proc/self/mountinfo")
IN_MEMORY = {"tmpfs", "ramfs", "overlay", "aufs", "devtmpfs", "squashfs"}
DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "vfat", "exfat", "ntfs", "bcachefs"}
SHARED = {"nfs", "nfs3", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "panfs", "wekafs", "orangefs"}
SHARED |= {"pvfs2", "afs", "gfs2", "ocfs2", "vast", "fuse.glusterfs", "fuse.ceph", "fuse.juicefs", "fuse.daos", "dvs"}
OF_THE_MACHINE = ("/", "/tmp", "/var", "/var/tmp", "/scratch/local", "/local")
LITTLE, SCARCE = 1 << 30, 10 << 30
"""Bytes below which a study cannot begin, and below which it may end early."""
FEW_FILES = 10_000


class Mount(NamedTuple):
    """A mounted file system."""

    point: str
    kind: str


@dataclass(frozen=True)
class Probe:
    """What was found by doing in the folder what a study does there.

    Attributes:
        refused: why nothing can be written; the rest is then without meaning.
        bytes: free for this user.
        files: that can still be made; None where the file system does not say.
        mode: of the folder.
        links: why hard links do not work; leases are made of them.
        sqlite: why the ledger does not work.
    """

    refused: str = ""
    bytes: int = 0
    files: int | None = None
    mode: int = 0o700
    links: str = ""
    sqlite: str = ""


def check_study_folder(folder: Path, slurm: bool, seconds: float = PATIENCE) -> list[CheckResult]:
    """Try it out; leaves nothing behind.

    Args:
        folder: of the study, there or to be made.
        slurm: whether its path must be one that Slurm takes.
        seconds: after which the file system counts as not answering.
    """
    try:
        if slurm:
            check_folder(folder)
        probe = _within(seconds, lambda: _tried(folder))
    except UserError as error:
        return [CheckResult("error", error.problem, error.hint)]
    except TimeoutError:
        hint = "choose another study_dir, or tell the administrators that the file system hangs"
        return [CheckResult("error", f"study_dir={folder} does not answer within {seconds:g} s", hint)]
    except OSError as error:
        return [CheckResult("error", f"study_dir={folder}: {error.strerror}", "choose another study_dir")]
    return check_probe(folder, probe) + check_umask(_umask())


def check_mount(name: str, path: Path, seconds: float = PATIENCE) -> CheckResult:
    """Whether other nodes are likely to see ``path``; only a job can tell."""
    try:
        return mount_result(name, _within(seconds, lambda: mount_of(_real(path), MOUNTS.read_text())))
    except (OSError, TimeoutError):
        return mount_result(name, None)


def check_probe(folder: Path, probe: Probe) -> list[CheckResult]:
    """What the trial means."""
    if probe.refused:
        return [
            CheckResult("error", f"study_dir={folder} cannot be written: {probe.refused}", "choose another study_dir")
        ]
    found = []
    free = f"{probe.bytes / 2**30:.1f} GiB free"
    if probe.bytes < SCARCE:
        level = "error" if probe.bytes < LITTLE else "warning"
        found.append(CheckResult(level, f"study_dir={folder}: {free}", "make room, or choose another study_dir"))
    if probe.files is not None and probe.files < FEW_FILES:
        level = "error" if probe.files < 100 else "warning"
        what = f"study_dir={folder}: only {probe.files} more files can be made there"
        found.append(CheckResult(level, what, "remove files, or choose another study_dir"))
    if probe.links:
        what = f"study_dir={folder} has no hard links ({probe.links}): two jobs could do the same run"
        found.append(CheckResult("error", what, "choose another file system"))
    if probe.sqlite:
        what = f"study_dir={folder}: the ledger does not work there ({probe.sqlite})"
        found.append(
            CheckResult("error", what, "choose another file system, or have it mounted with locks (NFS: lockd)")
        )
    if probe.mode & stat.S_IWOTH and not probe.mode & stat.S_ISVTX:
        what = f"study_dir={folder} can be written by everybody (mode {probe.mode:o}): they could run code as you"
        found.append(CheckResult("warning", what, f"chmod o-w {folder}"))
    if not any(f.status == "error" for f in found):
        found.insert(0, CheckResult("ok", f"study_dir={folder}: written, linked, locked; {free}"))
    return found


def check_umask(umask: int | None) -> list[CheckResult]:
    """Whether new files can be read by their owner, and not be written by all."""
    if umask is None:
        return []
    if umask & 0o700:
        return [
            CheckResult(
                "error", f"umask={umask:04o} hides new files from yourself", "umask 0022 in your shell's start-up"
            )
        ]
    if not umask & 0o002:
        what = f"umask={umask:04o} lets everybody write your new files: they could run code as you"
        return [CheckResult("warning", what, "umask 0022 in your shell's start-up")]
    return []


def mount_result(name: str, mount: Mount | None) -> CheckResult:
    """Whether nodes are likely to see a file system of this kind."""
    if mount is None:
        return CheckResult(
            "unknown", f"{name}: its file system could not be found", "c2g doctor --job tells whether nodes see it"
        )
    where = f"{name} is on {mount.kind} at {mount.point}"
    if mount.kind in SHARED:
        return CheckResult("ok", where)
    if mount.kind in IN_MEMORY or (mount.kind in DISKS and mount.point in OF_THE_MACHINE):
        hint = "choose a folder of the file system that the cluster shares; c2g doctor --job tells"
        return CheckResult("warning", f"{where}: node-local? nodes must see it", hint)
    return CheckResult("unknown", f"{where}: shared only if it is exported to the nodes", "c2g doctor --job tells")


def mount_of(path: str, mountinfo: str) -> Mount | None:
    """The file system that a real path lies on, from /proc/self/mountinfo."""
    best: Mount | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if len(before.split()) < 5 or not after:
            continue
        point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):  # what was mounted later lies above
            best = Mount(point, after.split()[0])
    return best


def _real(folder: Path) -> str:
    """Of the folder, or of what is there of it."""
    return os.path.realpath(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()))


def _tried(folder: Path) -> Probe:
    """Make the folder where it is not there, try all, take everything away again."""
    folder = folder.absolute()
    made = []
    try:
        for parent in reversed((folder, *folder.parents)):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        work = folder / f".doctor-{uuid.uuid4().hex[:12]}"
        work.mkdir(mode=0o700)
    except OSError as error:
        _remove(made)
        return Probe(refused=f"{error.strerror} ({error.filename})")
    try:
        mode, room = stat.S_IMODE(folder.stat().st_mode), os.statvfs(folder)
        try:
            write_atomically(work / "data", bytes(1 << 20))  # a quota shows only when it is met
        except UserError as error:
            return Probe(refused=error.problem)
        return Probe(
            bytes=room.f_bavail * room.f_frsize,
            files=room.f_favail if room.f_files else None,
            mode=mode,
            links=_link_fault(work),
            sqlite=sqlite_fault(work),
        )
    finally:
        for file in work.iterdir():
            with contextlib.suppress(OSError):
                file.unlink()
        _remove([*made, work])


def _remove(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _link_fault(work: Path) -> str:
    try:
        os.link(work / "data", work / "link")
    except OSError as error:
        return error.strerror or "refused"
    return "" if os.path.samefile(work / "data", work / "link") else "the link is another file"


OTHER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
try:
    connection.execute("begin immediate")
    print("free", connection.execute("select count(*) from t").fetchone()[0])
except sqlite3.OperationalError as error:
    print(error)
"""


def sqlite_fault(folder: Path, seconds: float = 20.0) -> str:
    """Why a ledger in rollback mode would not work in ``folder``; empty where it does. Another process must see its lock."""
    file = folder / "trial.sqlite"

    def other() -> str:
        command = [sys.executable, "-I", "-S", "-c", OTHER, str(file)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
        return done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]

    try:
        with closing(sqlite3.connect(file, timeout=5, isolation_level=None)) as connection:
            (mode,) = connection.execute("pragma journal_mode=delete").fetchone()
            if mode != "delete":
                return f"journal mode {mode}"
            connection.execute("pragma synchronous=full")
            connection.execute("create table t (x)")
            connection.execute("begin immediate")
            connection.execute("insert into t values (1)")
            locked = other()
            if "locked" not in locked:
                return f"another process does not see its lock: {locked}"
            connection.execute("commit")
            after = other()
            return "" if after == "free 1" else f"another process does not see what was written: {after}"
    except sqlite3.Error as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__} while a second process looked"


def _umask() -> int | None:
    try:
        found = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1], 8) if found else None


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What ``work`` returns or raises; it is left alone where it hangs.

    Raises:
        TimeoutError: it does.
    """
    result: list[T] = []
    fault: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            fault.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if fault:
        raise fault[0]
    return result[0]
