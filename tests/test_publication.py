"""Laws of a published experiment: every baseline beside the generator, numbers as in evaluation.json, no picture of private people."""

from __future__ import annotations

import json
import math

import pytest

from hpc_c2g.evaluation.metric_registry import numbers
from hpc_c2g.reporting.memorization import by_multiplier, shares_in
from hpc_c2g.reporting.publication import NOTES, content, publish, readme, table
from hpc_c2g.reporting.results import Results, point_of, public
from hpc_c2g.studies.tasks import Task, write_spec
from launch.publish import commands

EVALUATION = {
    "coverage": 0.4,
    "proximity": 0.5,
    "ssim_train_to_sample": {"mean": 0.6, "best10": 0.9},
    "settings": {"count": 10},
    "baselines": {"noise": {"coverage": 0.0, "ssim_train_to_sample": {"mean": 0.1, "best10": 0.2}}},
}


@pytest.fixture
def study(tmp_path):
    """Two seeds of a group, and one run of another that is judged on two classifiers."""
    rows = [{"id": f"r{i}", "variant": "a", "train.seed": i, "stationarity": 0.1 * (1 + i)} for i in range(2)]
    rows.append({"id": "r2", "variant": "b", "stationarity": 0.5, "alarms": "instability"})
    for i, row in enumerate(rows):
        folder = tmp_path / "study" / "runs" / row["id"]
        folder.mkdir(parents=True)
        own = EVALUATION | {"coverage": 0.4 + 0.1 * i}
        judged = own if i < 2 else {"uses_real_data": True, "classifiers": [own, own | {"coverage": 0.2}]}
        (folder / "evaluation.json").write_text(json.dumps(judged))
        (folder / "samples.png").write_bytes(b"picture")
    return tmp_path / "study", Results(rows, [], [], []), {row["id"]: f"runs/{row['id']}" for row in rows}


def test_metrics_are_plain_numbers_under_their_own_names():
    assert numbers(EVALUATION) == {
        "coverage": 0.4,
        "proximity": 0.5,
        "ssim_train_to_sample": 0.6,
        "ssim_train_to_sample_best10": 0.9,
    }


def test_means_are_over_seeds_and_over_the_classifiers_of_a_run(study):
    folder, found, folders = study
    groups = content(folder, "n", "a", found, folders)["groups"]
    assert groups["variant=a"]["mean"]["coverage"] == pytest.approx(0.45)
    assert groups["variant=a"]["sd"]["coverage"] == pytest.approx(0.0707, abs=1e-3)
    assert groups["variant=b"]["mean"]["coverage"] == pytest.approx(0.4)  # of 0.6 and 0.2
    assert [run["seed"] for run in groups["variant=a"]["runs"]] == [0, 1]
    assert groups["variant=a"]["baselines"]["noise"]["ssim_train_to_sample"] == pytest.approx(0.1)


def test_the_generator_stands_above_every_baseline(study):
    folder, found, folders = study
    lines = table(content(folder, "n", "a", found, folders)["groups"]["variant=a"])
    assert lines[2].startswith("| **generator**, 2 seeds | ")
    assert "0.45 ± 0.071" in lines[2]
    assert lines[3].startswith("| noise |")
    assert len({line.count("|") for line in lines}) == 1


def test_a_page_tells_how_long_the_generator_and_what_it_is_compared_with_were_trained(study):
    folder, found, folders = study
    for stage, config in {
        "train": {"steps": 1500, "solutions": 3},
        "evaluate": {"classification_steps": 2000, "free_steps": 800},
    }.items():
        write_spec(folder, Task(f"{stage}0", stage, folders["r0"], config))
    evaluation = EVALUATION | {"baselines": {"noise": {}, "classification_only": {}, "free_images": {}}}
    (folder / folders["r0"] / "evaluation.json").write_text(json.dumps(evaluation))
    whole = content(folder, "n", "a", found, folders)
    (folder / folders["r0"] / "evaluate.task.json").unlink()
    alone = content(folder, "n", "a", found, folders)["groups"]["variant=a"]["efforts"]
    assert alone == {"generator": {"steps": 1500, "solutions": 3}}
    told = "generator 1,500 steps (3 solutions); classification_only 1,500 steps; free_images 800 steps."
    assert f"Trained for: {told}" in readme(whole, [], [], "")
    assert whole["groups"]["variant=b"]["efforts"] == {}  # nothing describes its tasks


def test_a_page_tells_alarms_and_what_is_left_out(study):
    folder, found, folders = study
    whole = content(folder, "n", "a", found, folders) | {"left_out": ["run x: failed"]}
    page = readme(whole, ["c2g sweep"], [("p.svg", "a title", "a figure")], "\nmine\n")
    for words in ("alarms: instability", "- run x: failed", "![a figure](p.svg)", "    c2g sweep"):
        assert words in page
    assert page.partition(NOTES)[2] == "\n\nmine\n"
    again = readme(whole, ["c2g sweep"], [("p.svg", "a title", "a figure")], page.partition(NOTES)[2])
    assert again == page  # written again and again it does not grow


@pytest.mark.parametrize(("data", "shown"), [("digits", True), ("celeba", False)])
def test_no_picture_of_private_people_is_published(study, tmp_path, data, shown):
    folder, found, folders = study
    whole = content(folder, "n", "a", found, folders)
    publish(folder, tmp_path / "out", whole, [], [], folders, dict.fromkeys(folders, data))
    pictures = [p.name for p in (tmp_path / "out").glob("*.png")]
    assert bool(pictures) is shown
    assert (".png" in (tmp_path / "out" / "README.md").read_text()) is shown


def test_coverage_is_told_by_multiplier_where_the_classifier_has_a_certificate(study):
    folder, found, folders = study
    bundle = folder / "classifiers" / "c0"
    bundle.mkdir(parents=True)
    forms = [
        {"relative_residual": 0.5, "shares": [0.1] * 10},
        {"relative_residual": 0.1, "shares": [i / 45 for i in range(9, -1, -1)]},
    ]
    (bundle / "certificate.json").write_text(json.dumps(forms))
    for run, uncovered in (("r0", 4), ("r1", 6)):  # the least of them
        nearness = [0.5] * (10 - uncovered) + [1.5] * uncovered
        evaluation = EVALUATION | {"classifier": "/elsewhere/classifiers/c0", "nearness": nearness}
        (folder / "runs" / run / "evaluation.json").write_text(json.dumps(evaluation))
    groups = content(folder, "x", "about", found, folders)["groups"]
    parts = groups["variant=a"]["by_multiplier"]
    assert [part["coverage"] for part in parts] == [0, 0, 0.5, 1, 1]
    assert [round(45 * part["multipliers"]) for part in parts] == [1, 5, 9, 13, 17]
    assert groups["variant=b"]["by_multiplier"] == []
    page = readme(content(folder, "x", "about", found, folders), [], [], "")
    assert "| coverage | 0.00 | 0.00 | 0.50 | 1.00 | 1.00 |" in page


def test_a_certificate_of_other_data_tells_nothing():
    assert by_multiplier([0.5] * 10, [0.1] * 9) is None
    assert by_multiplier([0.5] * 10, []) is None
    assert by_multiplier([], []) is None
    assert by_multiplier([0.5] * 10, [0.0] * 10) is None
    assert by_multiplier([0.5] * 10, [math.nan] * 10) is None


def test_samples_with_the_same_share_count_alike_in_whichever_order_they_come():
    nearness, shares = [0.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, None, 0.5, 0.5], [0.0] * 8 + [0.4, 0.6]
    for order in (range(10), range(9, -1, -1)):
        parts = by_multiplier([nearness[i] for i in order], [shares[i] for i in order])
        assert [part["coverage"] for part in parts] == [0.5, 0.5, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    "damage", ["", "[]", "null", "{}", '[{"relative_residual": null}]', '[{"relative_residual": 0.1}]', "[{}]"]
)
def test_a_damaged_certificate_is_none(tmp_path, damage):
    (tmp_path / "certificate.json").write_text(damage)
    assert shares_in(tmp_path) is None
    assert shares_in(tmp_path / "nowhere") is None


def test_a_table_of_some_runs_is_not_shown_as_one_of_all(study):
    folder, found, folders = study
    bundle = folder / "classifiers" / "c0"
    bundle.mkdir(parents=True)
    (bundle / "certificate.json").write_text(json.dumps([{"relative_residual": 0.1, "shares": [0.1] * 10}]))
    evaluation = EVALUATION | {"classifier": "classifiers/c0", "nearness": [0.5] * 10}
    (folder / "runs" / "r0" / "evaluation.json").write_text(json.dumps(evaluation))
    assert content(folder, "x", "about", found, folders)["groups"]["variant=a"]["by_multiplier"] == []


def test_the_commands_tell_nothing_of_where_data_lie() -> None:
    told = commands("digits100", ["train.seed=0,1", "classifier.data.root=/home/me/my data"], "docs/it")
    assert told == [
        "c2g sweep experiment=digits100 study_dir=studies/it train.seed=0,1 classifier.data.root=DATA",
        "c2g publish studies/it docs/it",
    ]
    assert commands("mine", [], "o")[0].startswith("c2g sweep study=mine study_dir=studies/o")  # a study per page


def test_what_is_left_out_does_not_tell_where_data_lie() -> None:
    assert public("train.seed=0 classifier.data.root=/home/me/my data data=mnist") == "train.seed=0 data=mnist"


def test_a_page_tells_no_place_of_this_machine(study) -> None:
    folder, found, folders = study
    words = "train a (x=1): failed: data.root='/home/me/my data' has neither /home/me/b nor a/b -- mend /x:1"
    whole = content(folder, "n", "a", Results(found.rows, [], [], [words]), folders)
    assert whole["left_out"] == ["train a (x=1): failed: data.root='PATH' has neither PATH nor a/b -- mend PATH:1"]


def test_a_group_is_not_named_by_where_its_data_lie(study) -> None:
    folder, found, folders = study
    rows = [{**row, **point_of("classifier.data.root=/home/me/my data")} for row in found.rows]
    assert set(content(folder, "n", "a", Results(rows, [], [], []), folders)["groups"]) == {"variant=a", "variant=b"}
