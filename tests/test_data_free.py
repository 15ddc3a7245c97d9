"""The sacred law: a generator is trained from the bundle alone; no module it reaches knows data. And dependencies point one way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.imports import FILES, ROOT, imports, reachable

from hpc_c2g.classifiers.bundle import META, WEIGHTS

FORBIDDEN = ("hpc_c2g.data", "hpc_c2g.evaluation", "sklearn", "torchvision.datasets", "datasets")

# what a package may import of the others; every one may import the shared `errors` and `files`
KNOWS = {
    "kkt": set(),
    "distributed": set(),
    "monitoring": set(),
    "classifiers": {"kkt"},
    "generators": {"kkt", "classifiers"},
    "training": {"kkt", "classifiers", "generators", "distributed", "monitoring"},
    "planning": {"classifiers", "distributed", "training"},
    "scheduling": set(),
    "data": {"classifiers"},
    "studies": {"classifiers", "distributed", "monitoring", "training", "scheduling", "data", "evaluation"},
    "reporting": {"studies", "monitoring"},
    "evaluation": {"kkt", "classifiers", "generators", "distributed", "monitoring", "training", "data"},
}
SHARED = {"denormals", "errors", "files", "lease", "markdown", "settings"}
FITS_TO_DATA = "hpc_c2g.fitting.make"
"""The one module of `classifiers` that knows data: it makes bundles, and no training reaches it."""


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    "start", ["hpc_c2g.training.loop", "launch.train", "launch.sample", "hpc_c2g.training.results"]
)
def test_nothing_that_training_or_sampling_reaches_imports_data(start):
    chains = reachable(start)
    assert {"hpc_c2g.kkt.options", "hpc_c2g.generators.networks", "hpc_c2g.training.checkpoints"} <= chains.keys()
    assert [chain for name, chain in chains.items() if is_within(name, FORBIDDEN)] == []


def test_the_walk_finds_data_where_it_is_used():
    chains = reachable("launch.classifier")
    assert chains["hpc_c2g.data.load"][0] == "launch.classifier"
    assert "sklearn" in chains
    assert "hpc_c2g.kkt.stationarity" in reachable("hpc_c2g.training.loop")
    assert "hpc_c2g.data" in reachable("hpc_c2g.evaluation.evaluate")


def test_the_walk_sees_imports_of_every_form():
    source = """
import a.b
if TYPE_CHECKING:
    import types_only
def f():
    from c import d
    importlib.import_module("e.f")
from . import g
from ..h import i
"""
    assert imports(source, "p.q.m") == {"a.b", "c", "c.d", "e.f", "p.q", "p.q.g", "p.h", "p.h.i"}
    assert "types_only" in imports(source, "p.q.m", types_too=True)


def test_every_package_has_its_place_in_the_order():
    packages = {name.split(".")[1] for name in FILES if name.count(".") >= 2 and name.startswith("hpc_c2g.")}
    assert packages == KNOWS.keys()


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("hpc_c2g.")])
def test_dependencies_point_one_way(module):
    package = module.split(".")[1]
    allowed = KNOWS.get(package, set()) | SHARED | {package}
    if module == FITS_TO_DATA:
        allowed |= {"data"}
    known = {name.split(".")[1] for name in imports(FILES[module].read_text(), module) if name.startswith("hpc_c2g.")}
    assert known <= allowed, f"{module} imports {known - allowed}"


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("hpc_c2g")])
def test_the_package_does_not_know_its_command_line(module):
    assert not any(is_within(name, ("launch", "hydra")) for name in imports(FILES[module].read_text(), module))


def test_the_core_is_pure_mathematics():
    for module in (name for name in FILES if name.startswith("hpc_c2g.kkt.")):
        outside = {name.split(".")[0] for name in imports(FILES[module].read_text(), module)}
        assert outside <= {
            "torch",
            "math",
            "hpc_c2g",
            "collections",
            "typing",
            "__future__",
            "copy",
            "operator",
            "functools",
            "dataclasses",
            "contextlib",
        }, module


CHILD = f"""
import json, sys
from importlib.machinery import ModuleSpec

tried = []

class Wall:
    def find_spec(self, name, path=None, target=None):  # libraries ask whether sklearn is there without importing it
        if any(name == bad or name.startswith(bad + ".") for bad in {FORBIDDEN}):
            return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        tried.append(spec.name)
        raise ImportError(f"generator training imports {{spec.name}}")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Wall())
from pathlib import Path
from hpc_c2g.training.config.train import CheckpointConfig, LogConfig, TrainConfig
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.results import load_run

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
settings = {{"steps": 6, "global_batch": 9, "device": "cpu", "alpha": AlphaConfig(pilot_steps=3)}}
config = TrainConfig("bundle", "run", log=LogConfig(progress=False), checkpoint=CheckpointConfig(every=3), **settings)
assert train(config).steps_made == 6
load_run("run").generator.sample(12, 0)
print(json.dumps({{"modules": sorted(sys.modules), "opened": opened, "tried": tried}}))
"""


def test_a_run_needs_two_files_and_no_data(bundle_dir, tmp_path):
    alone = tmp_path / "alone"
    (alone / "bundle").mkdir(parents=True)
    for name in (META, WEIGHTS):
        shutil.copy(bundle_dir / name, alone / "bundle" / name)
    environment = {k: v for k, v in os.environ.items() if k != "HPC_C2G_DATA"} | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=alone, env=environment, capture_output=True, text=True, timeout=200
    )
    assert child.returncode == 0, child.stderr
    seen = json.loads(child.stdout.splitlines()[-1])
    assert "hpc_c2g.training.loop" in seen["modules"]
    assert [name for name in seen["modules"] if is_within(name, FORBIDDEN)] == []
    assert seen["tried"] == []
    assert any(name.endswith(WEIGHTS) for name in seen["opened"])
    images = (".png", ".jpg", ".jpeg", ".npz", ".npy", ".csv", ".gz", ".parquet", "-ubyte")
    own = str(alone / "run")
    read = [name for name in seen["opened"] if name.endswith(images) and not Path(alone, name).is_relative_to(own)]
    assert read == []
    assert (alone / "run" / "samples.png").exists()
