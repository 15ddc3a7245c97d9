"""Laws of what a run says of its making: versions, the revision or that there is none, and no variable that is not on the list."""

from __future__ import annotations

import subprocess
from pathlib import Path

import hpc_c2g
from hpc_c2g.distributed.environment import RECORDED, recorded
from hpc_c2g.monitoring import provenance

ROOT = Path(hpc_c2g.__file__).parent.parent


def test_no_secret_of_the_environment_is_written():
    environ = {"SLURM_JOB_ID": "7", "WANDB_API_KEY": "secret", "HOME": "/home/me", "SLURM_JWT": "token"}
    assert recorded(environ) == {"SLURM_JOB_ID": "7"}
    assert not [name for name in RECORDED if any(word in name for word in ("TOKEN", "KEY", "JWT", "PASS", "SECRET"))]


def test_versions_are_those_that_are_installed():
    found = provenance.versions()
    assert found["hpc_c2g"] == hpc_c2g.__version__
    assert {"python", "torch", "deepspeed", "tensorboard"} <= found.keys()


def test_the_revision_is_the_checkout_s_commit_with_a_word_on_changes(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    package = tmp_path / "hpc_c2g"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(hpc_c2g, "__file__", str(package / "__init__.py"))
    assert provenance.revision() == "installed package, no checkout"
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert provenance.revision() == git("rev-parse", "HEAD").strip()
    (package / "__init__.py").write_text("1")
    assert provenance.revision().endswith("with local changes")
    monkeypatch.setenv("PATH", "")
    assert provenance.revision() == "unknown: git does not answer"


def test_a_table_keeps_its_columns_whatever_the_values_hold():
    table = provenance.as_table({"a": "x|y", "b": "two\nlines"})
    assert table.splitlines()[2:] == ["| a | x\\|y |", "| b | two lines |"]
