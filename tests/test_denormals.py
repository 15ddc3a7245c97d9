"""Laws of flushing denormals: within a fit or a run they count as zero, outside nothing has changed."""

from __future__ import annotations

import threading

import pytest
import torch

from hpc_c2g.data.config import DataConfig
from hpc_c2g.denormals import flush_denormals
from hpc_c2g.fitting import make
from hpc_c2g.fitting.config import ClassifierConfig, MarginFitConfig
from hpc_c2g.fitting.make import make_classifier
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.step.train_step import TrainStep


def flushed() -> bool:
    return not (torch.full((), 1e-320, dtype=torch.float64) * 1).item()


def test_within_alone() -> None:
    assert not flushed()
    with flush_denormals():
        assert flushed()
        with flush_denormals():
            assert flushed()
        assert flushed()
    assert not flushed()


def test_after_an_error_all_is_as_before() -> None:
    with pytest.raises(ValueError, match="mistake"), flush_denormals():
        raise ValueError("mistake")
    assert not flushed()


def test_threads_that_are_started_within_flush_too() -> None:
    found: list[bool] = []
    with flush_denormals():
        thread = threading.Thread(target=lambda: found.append(flushed()))
        thread.start()
        thread.join()
    assert found == [True]


def test_fits_and_runs_flush(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    fit, step = make.fit_margin, TrainStep.__call__
    monkeypatch.setattr(make, "fit_margin", lambda *arguments: (seen.append(flushed()), fit(*arguments))[1])
    monkeypatch.setattr(TrainStep, "__call__", lambda *arguments: (seen.append(flushed()), step(*arguments))[1])
    folder = str(tmp_path / "classifier")
    data, margin = DataConfig(train_size=20, classes=[0, 1]), MarginFitConfig(target_margin=3.0)
    make_classifier(ClassifierConfig(out=folder, data=data, model={"_target_": "mlp", "width": 8}, fit=margin))
    settings = {"steps": 2, "global_batch": 8, "alpha": AlphaConfig(init=-1.0), "log": LogConfig(progress=False)}
    train(TrainConfig(folder, str(tmp_path / "run"), **settings))
    assert seen == [True, True, True]
    assert not flushed()
