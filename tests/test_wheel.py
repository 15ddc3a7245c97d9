"""Laws of the wheel: installed alone, it brings its commands, its settings and its licence."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="building the wheel needs the package `build`")
pytest.importorskip("hatchling", reason="building the wheel without network needs hatchling in this environment")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=out)
    assert made.returncode == 0, made.stdout + made.stderr
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def test_it_holds_every_module_and_every_settings_file_and_the_licence(wheel):
    names = set(wheel.namelist())
    modules = [p for package in ("hpc_c2g", "launch") for p in (ROOT / package).rglob("*.py")]
    assert {str(p.relative_to(ROOT)) for p in modules} <= names
    settings = {f"hpc_c2g/configs/{p.relative_to(ROOT / 'configs')}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert settings <= names
    assert "hpc_c2g/py.typed" in names
    profiles = {f"hpc_c2g/slurm_profiles/{p.name}" for p in (ROOT / "slurm" / "profiles").glob("*.yaml")}
    assert profiles == {name for name in names if name.startswith("hpc_c2g/slurm")} != set()
    (licence,) = (name for name in names if name.endswith("LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_it_holds_nothing_else(wheel):
    strange = [
        n
        for n in wheel.namelist()
        if not n.endswith((".py", ".yaml", ".html.j2", "LICENSE", "py.typed")) and ".dist-info/" not in n
    ]
    assert strange == []
    assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"hpc_c2g", "launch"}


CHILD = """
import sys
from hpc_c2g.scheduling.profile import load_profile
from launch.__main__ import main
from launch._compose.cli import config_folder

print(config_folder())
print(load_profile("local_slurm").name)
sys.argv = ["c2g", "train", "--cfg", "job"]
main()
"""


def test_it_runs_where_there_is_no_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    wheel.extractall(target)
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(target)}
    command = [sys.executable, "-c", CHILD]  # from an empty folder: -P came with 3.11
    child = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=100)
    assert child.returncode == 0, child.stderr
    folder, profile, *settings = child.stdout.splitlines()
    assert folder == str(target / "hpc_c2g" / "configs")
    assert profile == "local_slurm"
    assert {"global_batch: 200", "classifier: ???"} <= set(settings)


def test_the_command_is_declared(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "c2g = launch.__main__:main" in wheel.read(entry_points).decode()
