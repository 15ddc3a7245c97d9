"""Checks of a study's folder from the login node: free space, permissions, hard links."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hpc_c2g.errors import UserError
from hpc_c2g.files import write_atomically
from hpc_c2g.preflight.check_result import CheckResult, has_errors
from hpc_c2g.scheduling.batch_script import check_folder

T = TypeVar("T")
FOLDER_TIMEOUT_S = 60.0
MIN_BYTES, LOW_BYTES = 1 << 30, 10 << 30
"""Free bytes below which a study cannot begin, and below which it may end early."""
MIN_FILES, LOW_FILES = 100, 10_000
"""The same for the number of files that can still be created."""


@dataclass(frozen=True)
class FolderProbe:
    """Outcome of doing in a folder what a study does there.

    Attributes:
        write_error: Reason why nothing can be written; the other fields then have no meaning.
        free_bytes: Free bytes for this user.
        free_files: Number of files that can still be created; None if the file system does not report it.
        mode: Permission bits of the folder.
        link_error: Reason why hard links, which leases need, do not work; empty if they do.
    """

    write_error: str = ""
    free_bytes: int = 0
    free_files: int | None = None
    mode: int = 0o700
    link_error: str = ""


def check_study_folder(folder: Path, slurm: bool, seconds: float = FOLDER_TIMEOUT_S) -> list[CheckResult]:
    """Write into the folder, check the outcome, and leave nothing behind.

    Args:
        folder: Study folder, which need not exist.
        slurm: True if the path must be valid in a batch script.
        seconds: Time after which the file system counts as hanging.
    """
    try:
        if slurm:
            check_folder(folder)
        probe = _with_timeout(seconds, lambda: probe_folder(folder))
    except UserError as error:
        return [CheckResult("error", error.problem, error.hint)]
    except TimeoutError:
        hint = "choose another study_dir, or report the hanging file system to the administrators"
        return [CheckResult("error", f"study_dir={folder} does not answer within {seconds:g} s", hint)]
    except OSError as error:
        return [CheckResult("error", f"study_dir={folder}: {error.strerror}", "choose another study_dir")]
    return check_probe(folder, probe)


def check_probe(folder: Path, probe: FolderProbe) -> list[CheckResult]:
    """Check free space, permissions and links."""
    if probe.write_error:
        message = f"study_dir={folder} cannot be written: {probe.write_error}"
        return [CheckResult("error", message, "choose another study_dir")]
    results = []
    free = f"{probe.free_bytes / 2**30:.1f} GiB free"
    if probe.free_bytes < LOW_BYTES:
        status = "error" if probe.free_bytes < MIN_BYTES else "warning"
        hint = "free disk space, or choose another study_dir"
        results.append(CheckResult(status, f"study_dir={folder}: {free}", hint))
    if probe.free_files is not None and probe.free_files < LOW_FILES:
        status = "error" if probe.free_files < MIN_FILES else "warning"
        message = f"study_dir={folder}: only {probe.free_files} more files can be created there"
        results.append(CheckResult(status, message, "remove files, or choose another study_dir"))
    if probe.link_error:
        message = f"study_dir={folder} has no hard links ({probe.link_error}): two jobs could do the same run"
        results.append(CheckResult("error", message, "choose another file system"))
    if probe.mode & stat.S_IWOTH and not probe.mode & stat.S_ISVTX:
        message = f"study_dir={folder} is world-writable (mode {probe.mode:o}): others could run code as you"
        results.append(CheckResult("warning", message, f"chmod o-w {folder}"))
    if not has_errors(results):
        results.insert(0, CheckResult("ok", f"study_dir={folder}: files and hard links work; {free}"))
    return results


def probe_folder(folder: Path) -> FolderProbe:
    """Create the folder if it does not exist, write and link a file in it, and remove everything again."""
    folder = folder.absolute()
    created = []
    try:
        for parent in reversed((folder, *folder.parents)):
            if not parent.exists():
                parent.mkdir()
                created.append(parent)
        work = folder / f".doctor-{uuid.uuid4().hex[:12]}"
        work.mkdir(mode=0o700)
    except OSError as error:
        _remove(created)
        return FolderProbe(write_error=f"{error.strerror} ({error.filename})")
    try:
        mode, space = stat.S_IMODE(folder.stat().st_mode), os.statvfs(folder)
        try:
            write_atomically(work / "data", bytes(1 << 20))  # statvfs does not show a quota
        except UserError as error:
            return FolderProbe(write_error=error.problem)
        return FolderProbe(
            free_bytes=space.f_bavail * space.f_frsize,
            free_files=space.f_favail if space.f_files else None,
            mode=mode,
            link_error=_link_error(work),
        )
    finally:
        for file in work.iterdir():
            with contextlib.suppress(OSError):
                file.unlink()
        _remove([*created, work])


def _remove(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _link_error(work: Path) -> str:
    try:
        os.link(work / "data", work / "link")
    except OSError as error:
        return error.strerror or "refused"
    return "" if os.path.samefile(work / "data", work / "link") else "the link is another file"


def _with_timeout(seconds: float, work: Callable[[], T]) -> T:
    """Return what ``work`` returns, or raise what it raises; a call that hangs is abandoned in its thread.

    Raises:
        TimeoutError: ``work`` did not end within ``seconds``.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]
