"""Provenance of a run: versions, the code's revision, the machine, and the environment variables of a fixed list."""

from __future__ import annotations

import contextlib
import platform
import socket
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hpc_c2g

PACKAGES = ("hpc_c2g", "torch", "deepspeed", "hydra-core", "submitit", "tensorboard", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the toolkit's dependencies."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def revision() -> str:
    """Return the commit of the checkout that the code runs from, with a note on local changes; an installed package has none."""
    root = Path(hpc_c2g.__file__).parent.parent
    if not (root / ".git").exists():
        return "installed package, no checkout"
    try:
        commit, changes = (_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    except (OSError, subprocess.SubprocessError):
        return "unknown: git does not answer"
    return f"{commit.strip()}{' with local changes' if changes.strip() else ''}"


def _git(root: Path, *words: str) -> str:
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def machine() -> str:
    """Return the host, the processor architecture and the operating system."""
    return f"{socket.gethostname()}, {platform.machine()}, {platform.system()} {platform.release()}"


def as_table(values: Mapping[str, object], head: tuple[str, str] = ("what", "value")) -> str:
    """Return a markdown table of two columns."""
    cells = [head, ("---", "---"), *((name, str(value)) for name, value in values.items())]
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in cells)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
