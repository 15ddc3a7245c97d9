"""One process at a time owns a folder of a shared file system, across hosts, whatever happens to the owner.

The file ``leases/<epoch>`` with the highest epoch names the owner. A process claims by hard-linking a complete file to the next epoch: that
succeeds for one process alone, also on NFS and Lustre, where ``flock`` may be local or missing. The owner touches its file; whoever
has seen it untouched for ``expires`` seconds of its own monotonic clock may link the next epoch. An owner that was silent so long has
to link the next epoch as well, so the link decides between the two, and clocks of two hosts are never compared to decide anything.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hpc_c2g.errors import UserError
from hpc_c2g.files import cannot_write

EXIT_LEASE_LOST = 76
"""Exit code of a process whose lease was taken over."""
FOLDER = "leases"
MARGIN = 1.1  # a watcher waits longer than an owner trusts itself: monotonic clocks differ in rate a little
KEPT = 8  # earlier epochs that stay, so that a claimant that stalled meanwhile finds the name it wants taken
UNUSED = 3600.0  # seconds after which a temporary file belongs to nobody


@dataclass(frozen=True)
class Holder:
    """Holder of a lease. A ``pid`` of 0 means that the file could not be read; only silence ends such a lease."""

    epoch: int
    text: str = "an unknown process"
    job: str | None = None
    host: str = ""
    boot: str = ""
    namespace: str = ""
    pid: int = 0
    started: int = 0
    expires: float = 30.0
    token: str = ""

    @property
    def is_here(self) -> bool:
        """True if the holder ran on this host, boot and process namespace, so that ``pid`` is valid here; False if unknown."""
        here = _here()
        return all(here) and here == (self.host, self.boot, self.namespace)


@dataclass(frozen=True)
class _Reading:
    """One reading of the highest lease; a renewal changes it."""

    holder: Holder
    inode: int
    modified: int  # ns by the file system's clock; 0 marks a released lease, which needs no space on a full disk
    changed: int

    def age(self, now: float) -> float:
        return now - self.modified / 1e9

    def free(self) -> bool:
        """Return True if the lease is released or its holder has ended."""
        return self.modified == 0 or _has_ended(self.holder)


def live_holder(folder: Path, expires: float = 30.0) -> Holder | None:
    """Return the current holder of ``folder`` from one reading, without watching it; never raises.

    None: no holder, or one silent for ``expires`` (its own, if readable) by the clock of the file system, or by the local clock if the
    folder is read-only. A folder that cannot be listed gives the unknown holder. Only ``Lease.acquire`` decides ownership.
    """
    leases = folder / FOLDER
    try:
        reading = _read_highest(leases, expires)
        if reading is None or reading.free():
            return None
        now = _clock(leases)
        reading = _read_highest(
            leases, expires
        )  # read after the clock, so that a slow file system makes no lease look old
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return Holder(0)
    return None if reading is None or reading.free() or reading.age(now) > reading.holder.expires else reading.holder


class Lease:
    """Context that holds ``folder`` while a thread renews its lease.

    Args:
        folder: Folder to own; created if missing.
        text: Description of the holder in other processes' messages; job, host and process id if empty.
        job: Job id of the scheduler, if any.
        every: Seconds between renewals.
        expires: Seconds of silence after which another process may take over; stored in the lease, so watchers need not agree.
        on_lost: Callback, called once in the thread when another process owns the folder or renewals failed for ``expires``. By
            default the process ends with ``EXIT_LEASE_LOST``, since two processes must never write.

    A process that stops between ``still_mine`` and its write can write late; names of published files should contain ``epoch``.
    """

    def __init__(
        self,
        folder: Path,
        text: str = "",
        job: str | None = None,
        every: float = 5.0,
        expires: float = 30.0,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        if not 0 < 2 * every <= expires < math.inf:
            raise UserError(f"every={every} and expires={expires}", "choose 0 < every <= expires / 2")
        self.folder, self.text, self.job, self.every, self.expires = folder, text, job, every, expires
        self.epoch = 0
        self._leases = folder.absolute() / FOLDER  # also after a change of directory
        self._on_lost = on_lost or self._end
        self._owner: int | None = None  # the process that holds it; a fork of that process does not

    def acquire(self, wait: float = 0.0) -> Lease:
        """Become the owner.

        Waits ``wait`` seconds for a live owner to release. One that looks silent by the file system's clock is watched for its ``expires``
        even when ``wait`` is shorter: only silence that was watched counts.

        Raises:
            UserError: another process is the owner, or the folder cannot be written.
        """
        token = uuid.uuid4().hex
        temporary = self._leases / f".{token}.tmp"
        try:
            self._write(temporary, token)
            self._claim(temporary, token, time.monotonic() + wait)
        except OSError as error:
            raise cannot_write(self._leases, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._token, self._lock, self._stop, self._owner = token, threading.Lock(), threading.Event(), os.getpid()
        threading.Thread(target=self._keep, args=(self._stop,), name=f"lease of {self.folder}", daemon=True).start()
        self._clean()
        return self

    def still_mine(self) -> bool:
        """Renew now and return True on success: no process takes over for ``expires`` from now. Call right before publishing.

        File system errors are tolerated until ``expires`` after the last renewal. False is final; a fork always gets False.
        """
        if not self._is_held():
            return False
        with self._lock:
            if not self._is_held():  # released or lost meanwhile
                return False
            try:
                mine = self._renew()
            except OSError:
                mine = time.monotonic() - self._renewed <= self.expires
            if not mine:
                self._owner = None
            return mine

    def release(self) -> None:
        """Let others take over at once; does nothing if released, lost, or in a fork."""
        if not self._is_held():
            return
        self._stop.set()
        with self._lock, contextlib.suppress(OSError):  # unmarked, it ends by silence
            self._owner = None
            reading = _read_highest(self._leases, self.expires)
            if reading is not None and reading.holder.token == self._token:
                os.utime(self._leases / _name(reading.holder.epoch), ns=(0, 0))

    def __enter__(self) -> Lease:
        return self if self._is_held() else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _is_held(self) -> bool:
        return self._owner == os.getpid()

    def _write(self, temporary: Path, token: str) -> None:
        host, boot, namespace = _here()
        pid = os.getpid()
        text = self.text or f"{f'job {self.job}' if self.job else 'a process'} on {host}, process {pid}"
        holder = Holder(0, text, self.job, host, boot, namespace, pid, _started(pid) or 0, self.expires, token)
        self._leases.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({k: v for k, v in vars(holder).items() if k != "epoch"}))
        temporary.chmod(0o644)  # whoever may list the folder may read who holds it
        os.utime(temporary)  # by the call that renews, so that the two times are of one clock

    def _claim(self, temporary: Path, token: str, until: float) -> None:
        """Link ``temporary`` to an epoch above all others; on return the highest is ours.

        Success is only what a later reading shows: the reply of a link can be lost, and after a stall the name may be free but too low.
        """
        now, poll = os.stat(temporary).st_mtime, min(0.5, self.every / 10)
        last: _Reading | None = None
        refused: OSError | None = None
        silent_at = limit = until
        while True:
            read_at = time.monotonic()
            reading = _read_highest(self._leases, self.expires)
            if reading is not None and reading.holder.token == token:
                self.epoch = reading.holder.epoch
                return
            if refused is not None:
                raise refused
            if reading is not None and reading != last:
                silent_at = time.monotonic() + MARGIN * reading.holder.expires
                seems_silent = abs(reading.age(now)) > reading.holder.expires
                limit = max(until, silent_at) if last is None and seems_silent else until
                last = reading
            if reading is None or reading.free() or read_at >= silent_at:
                self._renewed = time.monotonic()
                try:
                    os.utime(temporary)
                    os.link(temporary, self._leases / _name(reading.holder.epoch + 1 if reading else 1))
                except FileExistsError:
                    time.sleep(poll)
                except FileNotFoundError:  # the folder was removed, or a cleaner was hasty
                    self._write(temporary, token)
                except OSError as error:
                    refused = error
            elif read_at >= limit:
                raise UserError(
                    f"{self.folder} is in use by {reading.holder.text}",
                    "wait for it, cancel that job, or choose another folder",
                )
            else:
                time.sleep(poll)

    def _renew(self) -> bool:
        """Touch the lease; if others may have seen ``expires`` of silence, link the next epoch. False: another owner has a higher epoch."""
        start = time.monotonic()
        reading = _read_highest(self._leases, self.expires)
        if reading is None or reading.holder.token != self._token:
            return False
        self.epoch = reading.holder.epoch
        path = self._leases / _name(self.epoch)
        os.utime(path)
        if time.monotonic() - self._renewed > self.expires:  # checked after the touch, which may be slow
            with contextlib.suppress(FileExistsError):
                os.link(path, self._leases / _name(self.epoch + 1))
            reading = _read_highest(self._leases, self.expires)
            if reading is None or reading.holder.token != self._token or reading.holder.epoch == self.epoch:
                return False
            self.epoch = reading.holder.epoch
        self._renewed = start
        return True

    def _keep(self, stop: threading.Event) -> None:
        while not stop.wait(self.every) and stop is self._stop:
            if not self.still_mine():
                if not stop.is_set():
                    self._on_lost()
                return

    def _end(self) -> None:
        try:
            threading.Timer(5.0, os._exit, [EXIT_LEASE_LOST]).start()  # a full pipe must not keep it alive
            print(
                f"{self.folder} was taken over by another process, or could not be written: this process ends",
                file=sys.stderr,
            )
            sys.stderr.flush()
        finally:
            os._exit(EXIT_LEASE_LOST)

    def _clean(self) -> None:
        """Remove old epochs and files of killed claimants; the highest epoch stays, so that epochs never decrease."""
        with contextlib.suppress(OSError):
            now = os.stat(self._leases / _name(self.epoch)).st_mtime
            for file in self._leases.iterdir():
                with contextlib.suppress(OSError):
                    epoch = _epoch(file.name)
                    unused = file.name.endswith(".tmp") and now - file.stat().st_mtime > UNUSED
                    if unused or (epoch is not None and epoch < self.epoch - KEPT):
                        file.unlink()


def _name(epoch: int) -> str:
    return f"{epoch:012d}"


def _epoch(name: str) -> int | None:
    """Return the epoch of a lease's file name; None for other files."""
    return int(name) if name.isascii() and name.isdecimal() and _name(int(name)) == name else None


def _read_highest(leases: Path, expires: float) -> _Reading | None:
    """Return the highest lease, or None. Opens folder and file, since NFS only guarantees fresh data on open."""
    for attempt in range(3):
        epochs = [epoch for epoch in map(_epoch, os.listdir(leases)) if epoch is not None]
        if not epochs:
            return None
        try:
            with open(leases / _name(max(epochs)), "rb") as file:
                state = os.fstat(file.fileno())
                holder = _parse(file.read(65536), max(epochs), expires)
                return _Reading(holder, state.st_ino, state.st_mtime_ns, state.st_ctime_ns)
        except OSError:  # superseded and removed between the two, unless it repeats
            if attempt == 2:
                raise
    return None


def _parse(content: bytes, epoch: int, expires: float) -> Holder:
    try:
        values = json.loads(content)
        holder = Holder(
            epoch,
            text=" ".join(str(values["text"]).split()),
            job=None if values["job"] is None else str(values["job"]),
            host=str(values["host"]),
            boot=str(values["boot"]),
            namespace=str(values["namespace"]),
            pid=int(values["pid"]),
            started=int(values["started"]),
            expires=float(values["expires"]),
            token=str(values["token"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Holder(epoch, expires=expires)
    return holder if holder.pid > 0 and 0 < holder.expires < math.inf else Holder(epoch, expires=expires)


def _clock(leases: Path) -> float:
    scratch = leases / f".{uuid.uuid4().hex}.tmp"
    try:
        scratch.touch()
        os.utime(scratch)
        return scratch.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def _here() -> tuple[str, str, str]:
    """Host, boot id and process namespace, within which a process id is unique; empty if unknown."""
    host = socket.gethostname()
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # /proc shows another namespace
            return host, "", ""
        return host, Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return host, "", ""


def _started(pid: int) -> int | None:
    """Start time of the process in kernel ticks; -1 for a zombie, None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        state, threads, started = fields[0], int(fields[17]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
    return -1 if state in (b"Z", b"X") and threads <= 1 else started  # a dead leader's threads may still write


def _has_ended(holder: Holder) -> bool:
    """Return True if the holder was a process of this host that has ended; False if that cannot be known."""
    if not holder.is_here:
        return False
    try:
        os.kill(holder.pid, 0)  # /proc may hide other users' processes, kill does not
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return holder.started > 0 and _started(holder.pid) not in (None, holder.started)
