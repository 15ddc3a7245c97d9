"""The survival benchmark in small: a run whose ranks are killed ends, says who died, and resumes to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from benchmarks.common import random_classifier
from benchmarks.launched import LaunchedRun
from benchmarks.survival import ENDED_WITHIN, RANKS, SETTINGS, Plan, attempt
from hpc_c2g.training.config.train import config_from
from hpc_c2g.training.loop import train


def test_killed_before_the_first_checkpoint_and_again_after_it(tmp_path: Path) -> None:
    overrides = [f"classifier={random_classifier(tmp_path / 'classifier')}", *SETTINGS, "deterministic=true"]
    # one process gives the bits of two
    train(config_from(OmegaConf.from_dotlist([*overrides, f"run_dir={tmp_path / 'undisturbed'}"])))
    plans = [Plan((1,), "early", 3, 0.0), Plan((0, 1), "step", 19, 0.0)]
    trial = attempt(
        lambda run_dir: LaunchedRun(RANKS, run_dir, overrides), plans, tmp_path / "run", tmp_path / "undisturbed"
    )
    assert trial is not None
    assert trial.finished
    assert set(trial.differs) <= {"layout/world_size"}  # every line of metrics.jsonl is the same too
    ends = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "undisturbed")]
    assert len(ends[0]) == len(ends[1])
    mine, other = (json.loads(lines[-1]) for lines in ends)
    assert all(mine[name] == other[name] for name in ("step", "loss", "stationarity", "alpha"))
    first, second = trial.kills
    assert first.step >= 3
    assert second.checkpoint >= 10
    assert first.named_by == ("run", "torchrun")
    assert second.named_by == ("torchrun",)  # nobody else is left
    assert all(k.seconds is not None and k.seconds < ENDED_WITHIN for k in trial.kills)
