"""The law of the project: a generator is trained from the bundle alone; no module that training reaches imports data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.imports import FILES, ROOT, is_within, reachable

from hpc_c2g.classifiers.bundle import META, WEIGHTS

FORBIDDEN = (
    *("hpc_c2g.data", "hpc_c2g.evaluation", "hpc_c2g.fitting"),
    *("sklearn", "torchvision.datasets", "datasets"),
)
DATA_FREE = (
    *("hpc_c2g.kkt", "hpc_c2g.classifiers", "hpc_c2g.generators", "hpc_c2g.training", "hpc_c2g.bound"),
    *("hpc_c2g.distributed", "hpc_c2g.monitoring", "hpc_c2g.planning", "hpc_c2g.scheduling"),
    *("launch.train", "launch.sample", "launch.bound", "launch.plan"),
)


def test_nothing_that_training_or_sampling_reaches_imports_data():
    reached = {start: reachable(start) for start in FILES if is_within(start, DATA_FREE)}
    for start, needed in (
        ("launch.train", "hpc_c2g.kkt.stationarity"),
        ("launch.sample", "hpc_c2g.generators.trained"),
    ):
        assert {needed, "hpc_c2g.training.checkpoints"} <= reached[start].keys()
    offenders = {
        start: chain
        for start, chains in reached.items()
        for name, chain in chains.items()
        if is_within(name, FORBIDDEN)
    }
    assert offenders == {}


def test_the_walk_finds_data_where_it_is_used():
    chains = reachable("launch.classifier")
    assert chains["hpc_c2g.data.load"][0] == "launch.classifier"
    assert "sklearn" in chains
    assert "hpc_c2g.kkt.stationarity" in reachable("hpc_c2g.training.loop")
    assert "hpc_c2g.data" in reachable("hpc_c2g.evaluation.evaluate")
    assert "hpc_c2g.fitting" in reachable("hpc_c2g.fitting.certify")


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
