"""Atomic file writes: a file is complete or absent, whatever happens during the write."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_c2g.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file beside ``path``, fsync, rename; on failure the old file stays as it was. Creates the folder.

    Raises:
        UserError: the file system refused (full, read-only, no permission).
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


def cannot_write(path: Path, error: OSError) -> UserError:
    """The message for a failed write."""
    return UserError(
        f"cannot write {path}: {error.strerror}", "free disk space or choose another folder; earlier files are intact"
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context that turns an OSError into the UserError of a failed write of ``path``."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def last_line(path: Path) -> dict[str, Any]:
    """Last complete line of a JSON-lines file such as metrics.jsonl, read from the end; empty if there is none."""
    block = 8192
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while True:
                file.seek(max(0, size - block))
                lines = file.read(block).splitlines()
                for line in reversed(lines[block < size :]):  # the first line may be cut off
                    with contextlib.suppress(ValueError):
                        found = json.loads(line)
                        if isinstance(found, dict):
                            return found
                if block >= size:
                    return {}
                block *= 8
    except OSError:
        return {}


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
