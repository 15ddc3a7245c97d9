"""Golden results: numbers of a tiny study's stages, recorded with the version of results that they belong to.

``python -m tests.helpers.golden`` records them anew. It refuses where a stage's numbers have changed although its settings and
``RESULTS_VERSION`` have not. Bits differ between CPUs and releases of torch, so numbers are compared to a relative ``TOLERANCE``.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hpc_c2g.studies.config import STAGES, StudyConfig
from hpc_c2g.studies.stages import load_stage
from hpc_c2g.studies.tasks import Task
from hpc_c2g.training.results import load_run
from launch._compose.grid import expand, plan

FILE = Path(__file__).parents[1] / "golden" / "results.json"
TOLERANCE = 1e-5
ABSOLUTE_TOLERANCE = 1e-7
"""For differences of numbers near 1, whose own digits cancel."""
STUDY = StudyConfig(
    name="golden",
    stages=list(STAGES),
    classifier=[
        *("data=digits", "data.classes=[0,1]", "data.train_size=20", "model=mlp", "model.width=8", "seed=0"),
        *("fit.target_margin=1", "fit.max_steps=3000"),
    ],
    train=["steps=4", "global_batch=8", "alpha.init=-1", "log.every=1", "deterministic=true", "device=cpu", "seed=0"],
    evaluate=["count=20", "baselines=false", "seed=0"],
    bound=["batches=[16]", "repeats=4", "reference_batch=256", "device=cpu", "seed=0"],
)
TRAIN_METRICS = (
    "loss",
    "stationarity",
    "duality",
    "rho",
    "multiplier_sum",
    "gradient/generator",
    "diversity",
    "roughness",
)
SKIPPED = ("settings", "nearness", "shares")
"""Keys of result files that name places or settings, or that other numbers summarize."""


@dataclass(frozen=True)
class Golden:
    """Results of one stage.

    Attributes:
        id: Id of the stage's task, which covers its settings and versions.
        numbers: Numbers of its results by name, to eight significant digits.
    """

    id: str
    numbers: dict[str, float]


def run_golden_study(folder: Path) -> dict[str, Golden]:
    """Run every stage in ``folder`` and return the results by stage."""
    found = {}
    for task in plan(STUDY, expand([])).values():
        (folder / task.folder).mkdir(parents=True, exist_ok=True)
        load_stage(task.stage)(folder, task)
        found[task.stage] = Golden(task.id, {k: float(f"{v:.8g}") for k, v in _numbers(folder, task).items()})
    return found


def _numbers(folder: Path, task: Task) -> dict[str, float]:
    place = folder / task.folder
    if task.stage == "classifier":
        return dict(_norms(load_file(place / "classifier.safetensors")))
    if task.stage == "train":
        last = json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])
        generator = load_run(str(place)).generator
        samples, _ = generator.sample(20, 0, "multipliers")
        return {k: last[k] for k in TRAIN_METRICS} | dict(_norms({"samples": samples}))
    file = {"certify": "certificate.json", "evaluate": "evaluation.json", "bound": "sampling_error.json"}[task.stage]
    return dict(_leaves(json.loads((place / file).read_text())))


def _norms(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            flat = tensor.double().flatten()
            yield f"{name}/norm", float(flat.norm())
            # depends on signs and order, and no terms cancel
            yield f"{name}/norm of its sum with a ramp", float((flat + torch.linspace(1, 2, len(flat)).double()).norm())


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a result file by path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        if key not in SKIPPED:
            yield from _leaves(part, f"{name}/{key}" if name else str(key))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


def read_golden() -> dict[str, Golden]:
    """Return the recorded results by stage."""
    return {stage: Golden(**entry) for stage, entry in json.loads(FILE.read_text()).items()}


def differences(recorded: Golden, found: Golden) -> list[str]:
    """Return a line per number that changed, appeared or is gone."""
    lines = []
    for name in sorted(recorded.numbers.keys() | found.numbers.keys()):
        one, other = recorded.numbers.get(name), found.numbers.get(name)
        same = (
            one is not None
            and other is not None
            and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
        )
        lines += [] if same else [f"{name}: {one} recorded, {other} now"]
    return lines


def changes(recorded: Mapping[str, Golden], found: Mapping[str, Golden]) -> dict[str, str]:
    """Return, by stage, what to do about results that changed; stages after the first one may only follow from it."""
    advice = {}
    for stage, now in found.items():
        before = recorded.get(stage, Golden("", {}))
        lines = differences(before, now)
        if lines and before.id == now.id:
            advice[stage] = (
                f"results of {stage} changed: raise RESULTS_VERSION[{stage!r}] in hpc_c2g/studies/results_version.py"
                f" and run `python -m tests.helpers.golden`: {'; '.join(lines[:5])}"
            )
        elif lines:
            advice[stage] = (
                f"results of {stage} changed with its settings or versions:"
                f" run `python -m tests.helpers.golden`: {'; '.join(lines[:5])}"
            )
    return advice


def main() -> None:
    """Record the results, unless a stage changed them under its old version."""
    with tempfile.TemporaryDirectory() as folder:
        found = run_golden_study(Path(folder))
    recorded = read_golden() if FILE.exists() else {}
    refused = [text for text in changes(recorded, found).values() if "raise RESULTS_VERSION" in text]
    if refused:
        sys.exit("\n".join(refused))
    FILE.write_text(json.dumps({stage: vars(golden) for stage, golden in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
