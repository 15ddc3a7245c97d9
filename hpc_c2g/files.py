"""Files that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hpc_c2g.errors import C2GError


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary neighbour, flush to the disk, rename; on failure the old file stays as it was. Makes the folder.

    Raises:
        C2GError: the file system refused (full, read-only, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> C2GError:
    """The message for a failed write."""
    return C2GError(
        f"cannot write {path}: {error.strerror}", "free disk space or choose another folder; earlier files are intact"
    )


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
