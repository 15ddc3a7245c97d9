"""``python -m benchmarks.signatures [--quick]``: does each signature of failure fire on runs made to fail that way, and on no good run?"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import show, write_result
from hpc_c2g.data.config import DataConfig
from hpc_c2g.fitting.config import ClassifierConfig
from hpc_c2g.fitting.make import make_classifier
from hpc_c2g.generators import networks
from hpc_c2g.generators.config import MLPGeneratorConfig
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.monitoring.signatures import BY_NAME
from hpc_c2g.training.config.objective import AlphaConfig, PriorConfig
from hpc_c2g.training.config.train import OptimizerConfig, TrainConfig
from hpc_c2g.training.loop import train


@dataclass(frozen=True)
class Case:
    """One training run of the benchmark.

    Attributes:
        name: Description of the change to the run.
        induces: Signatures that must fire; empty for good runs, which must raise none.
        changes: Changes to the settings of a good run.
        steps: Number of steps of the run.
        latent_gain: Factor on the continuous latents.
    """

    name: str
    induces: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    steps: int = 1000
    latent_gain: float = networks.GAIN


CASES = (
    Case("good: the default recipe", (), steps=3000),
    Case("good: batch 20", (), {"global_batch": 20}),
    Case(
        "latents that hardly reach the decoder",
        ("mode_collapse",),
        {"generator": MLPGeneratorConfig(codes=0)},
        latent_gain=0.01,
    ),
    Case("one code per class", ("mode_collapse",), {"generator": MLPGeneratorConfig(codes=1)}),
    Case("alpha held 2.5 too low", ("mode_invention",), {"alpha": AlphaConfig(init=-8.0, max_change=0.0)}),
    Case("a prior 100 times the conditions", ("mode_invention",), {"prior": PriorConfig(total_variation=100.0)}),
    Case("learning rate x 300", ("instability", "poor_quality"), {"optimizer": OptimizerConfig(lr=0.3)}),
    Case("multipliers' rate x 500", ("starvation",), {"optimizer": OptimizerConfig(lr_multipliers=5.0)}),
)


def outcome(case: Case, base: TrainConfig, seed: int, folder: Path) -> dict[str, Any]:
    """Signatures that fired, and when each did first."""
    config = replace(base, run_dir=str(folder), steps=case.steps, seed=seed, **case.changes)
    with mock.patch.object(networks, "GAIN", case.latent_gain):
        train(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = {n: next((line["step"] for line in lines if line.get(f"alarm/{n}")), None) for n in BY_NAME}
    highest = {n: max(line.get(f"signature/{n}", 0.0) for line in lines) for n in BY_NAME}
    return {"case": case.name, "seed": seed, "first": {n: s for n, s in first.items() if s}, "highest": highest}


def main() -> None:
    """Run all, print a table, and end in an error where one does not do what it must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed")
    quick = parser.parse_args().quick
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_classifier(ClassifierConfig(out=str(folder / "classifier"), data=DataConfig(train_size=100)))
        base = TrainConfig(
            str(folder / "classifier"), "", log=LogConfig(images_every=10**6, progress=False), device="cpu"
        )
        for case in CASES:
            for seed in (0,) if quick else (0, 1, 2):
                found = outcome(case, base, seed, folder / f"{CASES.index(case)}-{seed}")
                right = set(case.induces) <= found["first"].keys() if case.induces else not found["first"]
                rows.append({**found, "induces": case.induces, "right": right})
                wrong += [] if right else [f"{case.name}, seed {seed}: {found['first']}"]
    show(
        "signatures",
        [
            {
                "run": f"{r['case']}, seed {r['seed']}",
                "must fire": ", ".join(r["induces"]) or "none",
                "fired (at step)": ", ".join(f"{n} ({s})" for n, s in r["first"].items()),
                "highest level": max(r["highest"].values()),
                "right": r["right"],
            }
            for r in rows
        ],
    )
    if not quick:
        print(f"written: {write_result('signatures', {'seeds': 3}, rows=rows)}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
