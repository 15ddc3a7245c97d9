"""The sacred law: a generator is trained from the bundle alone; no module it reaches knows data. And dependencies point one way."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpc_c2g
from hpc_c2g.classifiers.bundle import META, WEIGHTS

ROOT = Path(hpc_c2g.__file__).parent.parent
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
FITS_TO_DATA = "hpc_c2g.classifiers.make"
"""The one module of `classifiers` that knows data: it makes bundles, and no training reaches it."""


def module_files() -> dict[str, Path]:
    files = {}
    for file in [*ROOT.glob("hpc_c2g/**/*.py"), *ROOT.glob("launch/*.py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


FILES = module_files()


def for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST, types_too: bool) -> Iterator[ast.AST]:
    """All nodes, also inside functions; without the blocks that only type checkers run, unless ``types_too``."""
    for child in ast.iter_child_nodes(tree):
        if types_too or not for_types_only(child):
            yield child
            yield from nodes(child, types_too)


def imports(source: str, module: str = "", types_too: bool = False) -> set[str]:
    """Full names that ``source`` imports, also inside functions and by ``import_module("...")``."""
    found = set()
    for node in nodes(ast.parse(source), types_too):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def reachable(start: str) -> dict[str, list[str]]:
    """Every name that importing and running ``start`` can import, with the chain that leads there."""
    chains, queue = {start: [start]}, [start]
    while queue:
        module = queue.pop()
        if module not in FILES:
            continue
        packages = {module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)}
        for name in packages | imports(FILES[module].read_text(), module):
            if name not in chains:
                chains[name] = [*chains[module], name]
                queue.append(name)
    return chains


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    "start", ["hpc_c2g.training.loop", "launch.train", "launch.sample", "hpc_c2g.training.results"]
)
def test_nothing_that_training_or_sampling_reaches_imports_data(start):
    chains = reachable(start)
    assert {"hpc_c2g.kkt.stationarity", "hpc_c2g.generators.networks", "hpc_c2g.training.checkpoints"} <= chains.keys()
    assert [chain for name, chain in chains.items() if is_within(name, FORBIDDEN)] == []


def test_the_walk_finds_data_where_it_is_used():
    chains = reachable("launch.classifier")
    assert chains["hpc_c2g.data.load"][0] == "launch.classifier"
    assert "sklearn" in chains
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
from hpc_c2g.training.config import CheckpointConfig, LogConfig, TrainConfig
from hpc_c2g.training.objective_config import ScaleConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.results import load_run

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
settings = {{"steps": 6, "global_batch": 9, "device": "cpu", "scale": ScaleConfig(pilot_steps=3)}}
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
