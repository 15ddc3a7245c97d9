"""Laws of collecting a study: means of its runs and no others, only what is new is read and written, damage costs its run alone."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.studies import c2g, sweep
from helpers.studies import tasks as rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.launched import differences
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation.metric_registry import numbers
from hpc_c2g.reporting import collect as collecting
from hpc_c2g.reporting import run_curves
from hpc_c2g.reporting.averages import Curves, average
from hpc_c2g.reporting.board import Board, named, numeric_variables
from hpc_c2g.reporting.mosaics import mosaic, ranked
from hpc_c2g.reporting.tables import as_csv
from hpc_c2g.studies.tasks import read_spec, spec_name
from launch._compose.recipes import recipes
from launch.collect import collected
from launch.report import alarms


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Two batches x two seeds on two digits, judged."""
    study = tmp_path_factory.mktemp("collect") / "study"
    sweep(
        study,
        *("study.stages=[classifier,train,evaluate]", "global_batch=8,12", "seed=0,1", "steps=12", "log.every=1"),
        *("evaluate.baselines=false", "evaluate.count=20", "cluster=debug"),
    )
    c2g("collect", study)
    return study


@pytest.fixture
def study(kept, tmp_path) -> Path:
    """A copy of its own."""
    shutil.copytree(kept, tmp_path / "study", symlinks=True)
    return tmp_path / "study"


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below, by what would change if it were written."""
    files = [f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()]
    return {str(f.relative_to(folder)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def scalars(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def lines(study: Path, folder: str) -> list[dict]:
    return [json.loads(line) for line in (study / folder / "metrics.jsonl").read_text().splitlines()]


def test_the_mean_of_a_group_is_that_of_its_seeds_with_students_interval(kept):
    for batch in (8, 12):
        own = [r.folder for r in rows(kept, "train") if f"global_batch={batch}" in r.label]
        assert len(own) == 2
        mean = scalars(kept / "board" / "0-study" / "mean" / f"global_batch={batch}")
        table = np.array([[line["stationarity"] for line in lines(kept, folder)] for folder in own])
        low, high = stats.t.interval(0.95, 1, table.mean(0), stats.sem(table, axis=0))
        for tag, wanted in (("", table.mean(0)), ("/low", low), ("/high", high)):
            found = mean.Scalars(f"stationarity{tag}")
            assert [e.step for e in found] == list(range(1, 13))
            # an end of the interval may be a small difference of means of order 1, which are kept in float32
            assert [e.value for e in found] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6), min_size=2, max_size=5), st.data())
def test_an_average_is_over_the_runs_that_wrote_the_scalar_there(values, data):
    there = [data.draw(st.lists(st.booleans(), min_size=6, max_size=6)) for _ in values]
    table = np.where(there, values, np.nan)
    runs = [Curves(np.arange(6), ("a",), row[:, None]) for row in table]
    found = average(runs).get("a")
    counts = np.sum(there, 0)
    kept = [i for i in range(6) if 2 * counts[i] >= len(values)]
    assert ([] if found is None else found.steps.tolist()) == kept
    for place, i in enumerate(kept):
        own = table[~np.isnan(table[:, i]), i]
        assert found.runs[place] == len(own)
        assert found.mean[place] == pytest.approx(own.mean(), abs=1e-9)
        half = stats.t.ppf(0.975, len(own) - 1) * own.std(ddof=1) / np.sqrt(len(own)) if len(own) > 1 else 0
        assert found.high[place] - found.mean[place] == pytest.approx(half, abs=1e-6)


def test_final_metrics_stand_against_the_swept_variable(kept):
    final = scalars(kept / "board" / "0-study" / "against global_batch")
    content = json.loads((kept / "results.json").read_text())
    assert {"final/stationarity", "final/coverage (uses real data)"} <= set(final.Tags()["scalars"])
    found = {e.step: e.value for e in final.Scalars("final/stationarity")}
    assert found == {g["global_batch"]: pytest.approx(g["stationarity"], rel=1e-5) for g in content["groups"]}


def test_every_run_is_a_session_with_its_point_and_all_its_metrics(kept):
    for row in rows(kept, "train"):
        session = scalars(kept / "board" / "0-study" / "hparams" / row.id)
        assert {"stationarity", "coverage (uses real data)", "transfer_accuracy (uses real data)"} <= set(
            session.Tags()["scalars"]
        )


def test_every_metric_of_an_evaluation_reaches_the_tables_and_the_board(kept):
    content = json.loads((kept / "results.json").read_text())["runs"]
    header = (kept / "results.csv").read_text().splitlines()[0].split(",")
    (file,) = (kept / "board" / "0-study" / "hparams" / "0").iterdir()
    columns = file.read_bytes()
    for row in rows(kept, "train"):
        judged = numbers(json.loads((kept / row.folder / "evaluation.json").read_text()))
        assert {"coverage", "ssim_train_to_sample", "ssim_train_to_sample_best10"} <= judged.keys()
        found = next(r for r in content if r["id"] == row.id)
        assert {name: found.get(name) for name in judged} == judged
        assert judged.keys() <= set(header)
        session = scalars(kept / "board" / "0-study" / "hparams" / row.id).Tags()["scalars"]
        assert {f"{name} (uses real data)" for name in judged} <= set(session)
        assert all(f"{name} (uses real data)".encode() in columns for name in judged)
        assert all(name in (kept / "results.md").read_text() for name in judged)


def test_pictures_and_what_they_show_in_words_are_there(kept):
    pictures = scalars(kept / "board" / "0-study" / "pictures")
    images = set(pictures.Tags()["images"])
    assert {"figures/quality-global_batch", "figures/learning_curves", "samples/global_batch=8"} <= images
    assert {f"{tag}/text_summary" for tag in images} | {"results/text_summary"} <= set(pictures.Tags()["tensors"])


def test_the_runs_are_behind_the_means_by_names_that_people_know(kept):
    links = {p.name: p for p in (kept / "board" / "runs").iterdir()}
    names = {f"global_batch={b} seed={s}" for b in (8, 12) for s in (0, 1)}
    assert set(links) == names | {f"{n} evaluation (uses real data)" for n in names}
    assert all(not p.readlink().is_absolute() for p in links.values())  # the study may be moved
    assert "stationarity" in scalars(links["global_batch=8 seed=0"]).Tags()["scalars"]
    real = scalars(links["global_batch=8 seed=0 evaluation (uses real data)"]).Tags()
    assert real["images"] == ["uses_real_data/training images, below them the nearest samples"]
    assert "uses_real_data/coverage" in real["scalars"]


def test_no_picture_of_real_images_is_in_a_training_run(kept):
    for row in rows(kept, "train"):
        assert scalars(kept / row.folder / "tensorboard").Tags()["images"] == ["samples"]


def test_collecting_again_writes_nothing_and_reads_no_run(study, monkeypatch):
    collected(study)  # a copy is other files
    before = state(study)
    monkeypatch.setattr(run_curves, "read_run", lambda folder, wanted: pytest.fail(f"{folder} is read again"))
    assert collected(study).changed == []
    assert state(study) == before
    assert "nothing new for the board" in c2g("collect", study)


def test_a_study_is_collected_without_torch(study):
    code = """
import sys
from pathlib import Path
from launch.collect import collected
assert collected(Path(sys.argv[1])).changed
assert "tensorboard" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(study)], check=True)


def test_only_what_a_change_touches_is_written_again(study):
    collected(study)
    row = next(r for r in rows(study, "train") if r.label == "global_batch=8 seed=0")
    file = study / row.folder / "evaluation.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"coverage": 0.77}))
    assert set(collected(study).changed) == {
        *("0-study/against global_batch", f"0-study/hparams/{row.id}", "0-study/pictures")
    }
    assert json.loads((study / "results.json").read_text())["runs"][0]["coverage"] == 0.77


def cut_middle(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:3], "\0\0\0\n", *lines[4:]]))


@pytest.mark.parametrize(
    ("damage", "words", "steps"),
    [
        (lambda f: f.write_bytes(b""), "has no lines", 12),
        (cut_middle, "line 4 is damaged", 12),
        (lambda f: f.unlink(), "cannot be read: No such file", 12),
    ],
)
def test_damaged_metrics_are_reported_and_the_rest_is_collected(study, damage, words, steps):
    row = rows(study, "train")[0]
    damage(study / row.folder / "metrics.jsonl")
    for _ in range(2):  # also where nothing has changed since
        found = collected(study)
        assert any(words in text for text in found.skipped[row.id])
        assert len(found.results.rows) == 4
        assert set(found.skipped) == {row.id}
    mean = scalars(study / "board" / "0-study" / "mean" / row.label.split()[0])
    assert mean.Scalars("stationarity")[-1].step == steps


def test_a_half_written_file_counts_as_far_as_it_is_whole_and_is_read_again_when_it_has_grown(study):
    row = rows(study, "train")[0]
    file = study / row.folder / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert row.id not in collected(study).skipped  # a run that writes is no damage
    with open(file, "ab") as more:
        more.write(whole[len(whole) // 2 :])
    assert f"0-study/mean/{row.label.split()[0]}" in collected(study).changed


def test_a_run_without_evaluation_or_of_a_damaged_one_is_reported_and_kept(study):
    first, second = rows(study, "train")[:2]
    (study / first.folder / "evaluation.json").unlink()
    (study / second.folder / "evaluation.json").write_text('{"coverage": 0.')
    found = collected(study).results
    assert [("coverage" in r) for r in found.rows] == [False, False, True, True]
    assert all("stationarity" in r for r in found.rows)
    assert [f"{r.id} ({r.label}): evaluation.json cannot be read" in " ".join(found.left_out) for r in (first, second)]


def test_steps_written_twice_by_a_requeued_run_count_once(study):
    row = rows(study, "train")[0]
    file = study / row.folder / "metrics.jsonl"
    file.write_text(file.read_text() * 2)
    found = collected(study)
    assert found.curves.read([row.id])[row.id].points("stationarity")[0].tolist() == list(range(1, 13))
    assert len(found.results.rows) == 4


def test_versions_that_differ_between_runs_are_reported(study):
    row = rows(study, "train")[0]
    file = study / row.folder / "train.report.json"
    content = json.loads(file.read_text())
    content["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(content))
    assert any("torch 1.0" in text for text in collected(study).results.left_out)


def test_a_run_that_vanished_leaves_the_board(study):
    row = rows(study, "train")[0]
    shutil.rmtree(study / row.folder)
    found = collected(study)
    assert f"hparams/{row.id}" not in " ".join(p.name for p in (study / "board" / "0-study").rglob("*"))
    assert named(row.label) not in {p.name for p in (study / "board" / "runs").iterdir()}
    assert row.id not in {r["id"] for r in found.results.rows if "stationarity" in r}


def test_a_damaged_manifest_or_part_is_made_again(study):
    (study / "board" / "manifest.json").write_text("{")
    shutil.rmtree(study / "board" / "0-study" / "pictures")
    assert "0-study/pictures" in collected(study).changed
    assert collected(study).changed == []


@pytest.mark.parametrize("label", ["a/b=../../etc", "x\0y", "  ", "n=$(rm -rf) `x`", "ä=ü" * 80, "..", "."])
def test_a_label_names_one_folder_that_stays_where_it_is(label):
    name = named(label)
    assert 0 < len(name) <= 100
    assert not set("/\0$`") & set(name)
    assert name not in (".", "..")


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_best_median_and_worst_are_by_coverage_or_without_it_by_the_residual(order):
    made = [{"id": str(i), "coverage": 0.1 * i, "stationarity": float(i)} for i in range(3)]
    assert [(what, r["id"]) for what, r in ranked([made[i] for i in order]).runs] == [
        *(("best", "2"), ("median", "1"), ("worst", "0"))
    ]
    for row in made:
        del row["coverage"]
    assert [r["id"] for _, r in ranked([made[i] for i in order]).runs] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("count", "names"), [(0, []), (1, ["best"]), (2, ["best", "worst"]), (7, ["best", "median", "worst"])]
)
def test_few_runs_are_ranked_as_far_as_they_go(count, names):
    assert [what for what, _ in ranked([{"id": str(i), "stationarity": 1.0 + i} for i in range(count)]).runs] == names


def test_a_mosaic_is_bounded_and_says_what_it_shows(tmp_path):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        Image.new("L", (3000, 900)).save(tmp_path / str(i) / "samples.png")
    chosen = ranked([{"id": str(i), "stationarity": 0.1 + i} for i in range(3)])
    picture = mosaic("a", chosen, {str(i): tmp_path / str(i) for i in range(3)})  # the third has no picture
    (tmp_path / "out.png").write_bytes(picture.png)
    with Image.open(tmp_path / "out.png") as image:
        assert image.width <= 2 * 480 + 12
    assert "best run 0, stationarity 0.1" in picture.alt
    assert "run 2" not in picture.alt


def test_steps_of_a_chart_are_whole_numbers():
    groups = [{"n": n, "rate": r, "variant": v, "runs": 1} for n in (1, 2) for r in (0.1, 0.2) for v in "ab"]
    found = numeric_variables(groups)
    assert set(found) == {"n"}
    assert set(found["n"]) == {f"rate={r} variant={v}" for r in (0.1, 0.2) for v in "ab"}
    assert [row["n"] for row in found["n"]["rate=0.1 variant=a"]] == [1, 2]


def test_the_csv_has_a_column_per_field_of_any_row():
    made = [{"id": "a", "n": 1, "x": 0.5}, {"id": "b", "n": 2, "v": "t", "x": 2}]
    found = list(csv.DictReader(io.StringIO(as_csv(made))))
    assert found == [{"id": "a", "n": "1", "x": "0.5", "v": ""}, {"id": "b", "n": "2", "x": "2", "v": "t"}]


def test_the_plan_is_the_prediction_of_the_kind_of_scaling_that_was_done(study):
    steps = {"strong": [(1, 8, 0.5), (2, 8, 0.3)], "weak": [(1, 8, 0.5), (2, 16, 0.6)]}
    plan = {k: [{"nodes": n, "global_batch": b, "step": {"total": t}} for n, b, t in v] for k, v in steps.items()}
    (study / "plan.json").write_text(json.dumps(plan))
    runs = {v.task.id: v for v in collecting.training_runs(_views(study))}
    one = {k: v for k, v in runs.items() if "global_batch=8" in v.task.label}
    assert collecting.predicted(study, one) == {1: 16.0, 2: pytest.approx(8 / 0.3)}
    grown = [dataclasses.replace(v, task=dataclasses.replace(v.task, nodes=1 + i)) for i, v in enumerate(runs.values())]
    assert collecting.predicted(study, {v.task.id: v for v in grown})[2] == pytest.approx(16 / 0.6)
    (study / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json of the study cannot be read"):
        collecting.predicted(study, runs)
    assert "plan.json of the study cannot be read" in " ".join(collected(study).results.left_out)
    (study / "plan.json").unlink()
    assert collecting.predicted(study, runs) is None


def _views(study: Path):
    from hpc_c2g.studies.task_status import read_statuses

    return read_statuses(study, None)


def test_the_report_has_all_and_its_recipes_repeat_the_runs_bit_for_bit(study, tmp_path, monkeypatch):
    c2g("report", study)
    page = (study / "report.html").read_text()
    for row in rows(study, "train"):
        assert row.id in page
    for words in ("Means over seeds", "Learning curves", "Samples", "How to repeat each run", "uses real data"):
        assert words in page
    recipe = next(r for r in recipes(study) if r.label == "global_batch=12 seed=1")
    monkeypatch.chdir(tmp_path)
    for command in recipe.commands:
        words = shlex.split(command)
        assert words[0] == "c2g"
        c2g(*words[1:])
    row = next(r for r in rows(study, "train") if r.id == recipe.run)
    assert differences(study / row.folder, tmp_path / row.folder) == []
    mine, theirs = (json.loads((f / row.folder / "evaluation.json").read_text()) for f in (study, tmp_path))
    assert {k: v for k, v in mine.items() if k != "classifier"} == {
        k: v for k, v in theirs.items() if k != "classifier"
    }


def test_a_published_experiment_has_its_tables_and_pictures_and_keeps_what_people_wrote(study, tmp_path):
    out = tmp_path / "docs"
    c2g("publish", study, out)
    content = json.loads((out / "results.json").read_text())
    group = content["groups"]["global_batch=8"]
    assert content["uses_real_data"] is True
    assert group["mean"]["coverage"] == pytest.approx(np.mean([run["coverage"] for run in group["runs"]]))
    assert {run["seed"] for run in group["runs"]} == {0, 1}
    page = out / "README.md"
    assert "**generator**, 2 seeds" in page.read_text()
    assert {"global_batch_8-samples.png", "global_batch_8-nearest.png", "quality-global_batch.svg"} <= {
        p.name for p in out.iterdir()
    }
    page.write_text(page.read_text() + "What we saw.\n")
    c2g("publish", study, out)
    assert page.read_text().count("What we saw.") == 1


def test_a_recipe_of_several_processes_starts_them(study):
    row = rows(study, "train")[0]
    spec = dataclasses.replace(read_spec(study / spec_name(row)), nodes=2, tasks_per_node=4)
    from launch._compose.recipes import command

    assert command(spec).startswith("srun --nodes=2 --ntasks-per-node=4 c2g train ")


def test_alarms_of_runs_are_reported_with_their_first_step(study):
    row = rows(study, "train")[0]
    with open(study / row.folder / "metrics.jsonl", "a") as file:
        for step, fired in ((13, 0.0), (14, 1.0), (15, 1.0)):
            line = {"step": step, "alarm/instability": fired, "signature/instability": 3.0 * fired}
            file.write(json.dumps(line) + "\n")
    runs = {v.task.id: v for v in _views(study) if v.task.stage == "train"}
    found = alarms(collected(study).curves.read(runs), runs).rows
    (line,) = [line for line in found if line[0] == row.id and line[2] == "instability"]
    assert line[:6] == [row.id, row.label, "instability", 14, 3.0, "yes"]


def test_a_study_that_has_not_begun_is_collected_too(tmp_path):
    sweep(tmp_path / "s", "--dry-run")
    from hpc_c2g.studies.study import StudyFile, save_study
    from launch._compose.grid import plan

    study = StudyFile()
    study.study.name = "none"
    save_study(tmp_path / "s", study, plan(study.study, [{}]))
    found = collected(tmp_path / "s")
    assert found.results.rows == []
    assert len(found.results.left_out) == len(rows(tmp_path / "s", "train")) == 1
    c2g("report", tmp_path / "s")


def test_parts_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    from hpc_c2g.errors import UserError

    (tmp_path / "board").write_text("a file")
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/board"):
        Board(tmp_path).part("x", 1, lambda writer: None)


def test_board_says_how_to_get_there_and_shows_a_study_or_a_run_on_this_machine_alone(study, monkeypatch):
    became = []
    monkeypatch.setattr("os.execv", lambda program, words: became.append(words))
    row = rows(study, "train")[0]
    for folder, shown in ((study, study / "board"), (study / row.folder, study / row.folder)):
        printed = c2g("board", folder, "port=0")
        words = became[-1]
        assert words[words.index("--host") + 1] == "127.0.0.1"
        assert words[words.index("--logdir") + 1] == str(shown)
        port = words[words.index("--port") + 1]
        assert f"ssh -N -L {port}:localhost:{port} " in printed


def test_board_reports_what_it_cannot_show(tmp_path, study):
    import socket

    assert "is neither a study nor a run" in c2g("board", tmp_path, code=2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port={port} cannot be opened" in c2g("board", study, f"port={port}", code=2)
    assert "port=70000 is not a port" in c2g("board", study, "port=70000", code=2)
