"""Laws of the evaluation: one table for the run and its baselines, labeled as using real data, on the classifier's own data."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.load import load_split
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation import evaluate as module
from hpc_c2g.evaluation.config import EvaluateConfig
from hpc_c2g.evaluation.evaluate import evaluate, side_by_side
from hpc_c2g.evaluation.metrics import judge
from hpc_c2g.fitting.config import ClassifierConfig, MarginFitConfig
from hpc_c2g.fitting.make import RECORD, make_classifier
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import CheckpointConfig, TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.results import load_run

KEYS = {
    *("proximity", "coverage", "oracle_accuracy", "transfer_accuracy", "diversity"),
    *("ssim_sample_to_train", "ssim_train_to_sample"),
    *("coverage_chance", "recovered", "recovered_relative"),
}
OF_ROWS = {"marginal_distance", "correlation_distance"}
DATA = DataConfig(train_size=30, classes=[0, 1, 2], held_out_size=420)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A short run on three digits, beside its classifier."""
    folder = tmp_path_factory.mktemp("evaluate")
    model, fit = {"_target_": "mlp", "width": 32}, MarginFitConfig(target_margin=5.0)
    make_classifier(ClassifierConfig(out=str(folder / "classifier"), data=DATA, model=model, fit=fit))
    settings = {"steps": 20, "global_batch": 30, "alpha": AlphaConfig(init=-math.log(5)), "device": "cpu"}
    train(TrainConfig(str(folder / "classifier"), str(folder / "run"), log=LogConfig(progress=False), **settings))
    return folder / "run"


@pytest.fixture(scope="module")
def config(run_dir) -> EvaluateConfig:
    return EvaluateConfig(str(run_dir), count=60, seed=1, classification_steps=10, free_steps=7)


@pytest.fixture(scope="module")
def result(config) -> dict:
    """What the first evaluation returned."""
    (only,) = evaluate(config)
    return only


def test_the_file_holds_exactly_the_promised_table(result, run_dir):
    written = json.loads((run_dir / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert written.keys() == KEYS | OF_ROWS | {
        *("uses_real_data", "classifier", "recovery", "nearness", "settings", "baselines")
    }
    assert written["uses_real_data"] is True
    assert {"real", "noise", "classification_only", "free_images"} <= written["baselines"].keys()
    for row in (written, *written["baselines"].values()):
        assert row.keys() >= KEYS | OF_ROWS
        assert all(row[key] is None for key in OF_ROWS)  # of images
        for key in KEYS:
            values = row[key].values() if key.startswith("ssim") else [row[key]]
            assert all(math.isfinite(value) for value in values)
    for name, row in written["baselines"].items():
        assert row.keys() == KEYS | OF_ROWS | ({"recovery"} if name != "real" else set())
    assert written["recovery"]["distance"]["rates"][0]["share"] == written["recovered"]
    assert (run_dir / "recovered.csv").read_text().count("\n") == 1 + DATA.train_size
    assert len(written["nearness"]) == DATA.train_size
    assert sum(near < 1 for near in written["nearness"]) / DATA.train_size == written["coverage"]
    assert written["settings"]["count"] == 60
    assert written["settings"]["seed"] == 1
    assert DataConfig(**written["settings"]["data"]) == DATA


def test_the_run_is_judged_by_its_own_samples(result, run_dir):
    samples, labels = load_run(run_dir).generator.sample(60, 1)
    wanted = judge(samples, labels, load_split(DATA), 1)
    assert {key: result[key] for key in KEYS | OF_ROWS} == wanted


def test_the_baselines_are_apart(result):
    rows = result["baselines"]
    assert rows["real"]["oracle_accuracy"] > 0.9
    assert rows["noise"]["oracle_accuracy"] < 0.7
    assert rows["noise"]["proximity"] > 2
    assert rows["real"]["proximity"] == pytest.approx(1, abs=0.3)
    assert rows["classification_only"] != {key: result[key] for key in KEYS}


def test_the_baselines_are_what_their_names_say(result, run_dir):
    without, free = (
        load_run(run_dir / "baselines" / name) for name in ("classification_only-10-at-20", "free_images-7")
    )
    assert without.config.stationarity.weight == 0
    assert (without.config.steps, without.config.generator) == (10, load_run(run_dir).config.generator)
    assert (free.config.steps, free.config.generator.name, free.config.stationarity.weight) == (7, "free", 1)
    assert free.generator.module.image.shape == (60, 1, 8, 8)  # twice the training images


def test_the_picture_shows_every_training_image_above_its_nearest_sample(result, run_dir):
    with Image.open(run_dir / "nearest.png") as picture:
        assert picture.size == (5 * (20 * 9 + 1), 5 * 2 * (2 * 9 + 1))  # 20 pairs, and the other 10 below


def test_nearest_pairs_stand_one_above_the_other_best_first():
    train_images = torch.stack([torch.full((1, 2, 2), value) for value in (0.9, 0.1, 0.5)])
    samples = torch.stack([torch.full((1, 2, 2), value) for value in (0.52, 0.1, 0.8)])
    picture = side_by_side(samples, train_images)
    assert picture.shape == (1, 2 * 3 + 1, 3 * 3 + 1)
    assert picture[0, 1, 1::3].tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert picture[0, 4, 1::3].tolist() == pytest.approx([0.1, 0.52, 0.8])


def test_running_again_trains_no_baseline_and_gives_the_same(result, config, run_dir, monkeypatch):
    steps_made = []

    def watched(settings):
        done = train(settings)
        steps_made.append(done.steps_made)
        return done

    monkeypatch.setattr(module, "train", watched)
    assert evaluate(config) == [result]
    assert steps_made == [0, 0]


def test_evaluation_leaves_the_run_as_it_was(result, run_dir):
    assert Checkpoints(run_dir / "checkpoints", CheckpointConfig()).steps() == [20]
    assert load_run(run_dir).config.run_dir == str(run_dir)


def test_without_baselines_none_is_trained(run_dir, tmp_path, config):
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("baselines", "evaluation.json"))
    (alone,) = evaluate(replace(config, run_dir=str(tmp_path / "run"), baselines=False))
    assert alone["baselines"] == {}
    assert not (tmp_path / "run" / "baselines").exists()
    assert (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (DataConfig(name="wine"), "data.name=wine, but the classifier was fitted with digits"),
        (DataConfig(train_size=50), "data.train_size=50, but the classifier was fitted with 30"),
        (DataConfig(train_size=None), "data.train_size=None, but the classifier was fitted with 30"),
        (DataConfig(classes=[0, 1]), r"data.classes=\[0, 1\], but the classifier was fitted with \[0, 1, 2\]"),
        (DataConfig(seed=3), "data.seed=3, but the classifier was fitted with 0"),
    ],
    ids=["name", "size", "all", "classes", "seed"],
)
def test_data_against_the_record_are_refused(config, asked, message):
    with pytest.raises(UserError, match=message):
        evaluate(replace(config, data=asked))


@pytest.mark.parametrize("asked", [DATA, DataConfig(root="/elsewhere"), DataConfig(train_size=30)])
def test_data_that_agree_with_the_record_take_the_rest_from_it(config, run_dir, tmp_path, asked):
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("baselines"))
    settings = replace(config, run_dir=str(tmp_path / "run"), baselines=False, data=asked)
    assert evaluate(settings)[0]["settings"]["data"]["held_out_size"] == DATA.held_out_size


def test_without_a_record_the_data_must_be_named_and_must_fit(config, run_dir, tmp_path):
    shutil.copytree(run_dir.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "classifier" / RECORD).unlink()
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace(str(run_dir.parent), str(tmp_path)))
    config = replace(config, run_dir=str(tmp_path / "run"), baselines=False)
    with pytest.raises(UserError, match="has no record of its training data"):
        evaluate(config)
    with pytest.raises(UserError, match=r"shape \[13\], the generator makes \[1, 8, 8\]"):
        evaluate(replace(config, data=DataConfig(name="wine")))
    with pytest.raises(UserError, match="has 10 classes, the generator 3"):
        evaluate(replace(config, data=DataConfig(name="digits")))
    assert evaluate(replace(config, data=DATA))[0].keys() >= KEYS


@pytest.mark.parametrize("field", ["count", "classification_steps", "free_steps"])
def test_numbers_must_be_positive(field):
    with pytest.raises(UserError, match=f"{field}=0"):
        EvaluateConfig(run_dir="r", **{field: 0})


def test_without_a_run_there_is_nothing_to_judge(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        evaluate(EvaluateConfig(str(tmp_path)))
