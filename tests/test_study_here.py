"""Laws of a study on one machine: each task runs once, the same command resumes after any kill, and one run's failure is its own."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.studies import (
    SMALL,
    assert_same_runs,
    c2g,
    environment,
    report,
    start,
    states,
    status,
    steps,
    sweep,
    tasks,
    wait_for,
)

import launch.sweep
from hpc_c2g.fitting import progress
from hpc_c2g.studies.journal import FILE
from hpc_c2g.studies.launcher import launching
from hpc_c2g.studies.stages import load_stage

GRID = ("train.seed=0,1",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study that one process ran through."""
    study_dir = tmp_path_factory.mktemp("studies") / "finished"
    out = sweep(study_dir, "cluster=debug", *GRID)
    assert "3 done" in out
    return study_dir


def fitted(finished: Path, study_dir: Path) -> Path:
    """A new study whose classifier has been fitted: processes that only train start sooner."""
    shutil.copytree(finished / "classifiers", study_dir / "classifiers")
    return study_dir


def test_the_same_command_does_nothing_twice(finished):
    before = [report(finished, task) for stage in ("classifier", "train") for task in tasks(finished, stage)]
    assert "3 done" in sweep(finished, "cluster=debug", *GRID)
    assert [report(finished, task) for stage in ("classifier", "train") for task in tasks(finished, stage)] == before
    assert {r.attempts for r in before} == {1}


def test_processes_give_what_one_process_gives(finished, tmp_path):
    sweep(tmp_path / "s", "cluster=local", *GRID)
    assert_same_runs(tmp_path / "s", finished)


def test_a_killed_launcher_loses_nothing_and_what_it_started_is_waited_for(finished, tmp_path):
    study_dir, slow = fitted(finished, tmp_path / "s"), ("steps=120", *GRID)
    process = start("sweep", *SMALL[:-1], "seed=0", f"study_dir={study_dir}", "cluster=local", *slow)
    wait_for(lambda: steps(study_dir) > 4)
    process.kill()
    process.communicate()
    out = sweep(study_dir, "cluster=local", *slow)
    assert "3 done" in out
    assert {report(study_dir, task).attempts for task in tasks(study_dir, "train")} == {1}


def test_a_signal_saves_and_the_same_command_resumes_bitwise(finished, tmp_path):
    slow = ("steps=150", *GRID)
    sweep(fitted(finished, tmp_path / "whole"), "cluster=debug", *slow)
    study_dir = fitted(finished, tmp_path / "s")
    process = start("sweep", *SMALL, f"study_dir={study_dir}", "cluster=local", *slow)
    wait_for(lambda: steps(study_dir) > 4)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 75
    assert "the same command" in err
    ends = {
        report(study_dir, task).state
        for task in tasks(study_dir, "train")
        if (study_dir / task.folder / "train.report.json").exists()
    }
    assert ends <= {"interrupted", "done"}
    assert "interrupted" in ends
    sweep(study_dir, "cluster=local", *slow)
    assert_same_runs(study_dir, tmp_path / "whole")


def test_a_poisoned_run_is_tried_again_given_up_and_blocks_nothing_but_its_own(tmp_path):
    study_dir = tmp_path / "s"
    out = sweep(study_dir, "cluster=local", "fit.max_steps=1,100000", "retries=1", code=1)
    bad, good = tasks(study_dir, "classifier")
    failed = report(study_dir, bad)
    assert (failed.state, failed.attempts, failed.failures) == ("failed", 2, 2)
    assert "fit.max_steps=1 passed" in failed.cause
    assert report(study_dir, good).state == "done"
    assert states(study_dir) == {"classifier": ["failed", "done"], "train": ["blocked", "done"]}
    assert "fit.max_steps=1 passed" in out
    assert "c2g retry" in out
    printed = c2g("logs", study_dir / bad.folder)
    assert "fit.max_steps=1 passed" in printed
    again = c2g("retry", study_dir, code=1)
    assert "failed" in again
    assert report(study_dir, bad).attempts == 4
    assert report(study_dir, good).attempts == 1


def test_more_seeds_extend_a_study_and_nothing_else_does(finished, tmp_path):
    study_dir = tmp_path / "s"
    sweep(study_dir, "cluster=debug", "train.seed=0")
    assert "add these runs with --extend" in sweep(study_dir, "cluster=debug", "train.seed=1", code=2)
    sweep(study_dir, "cluster=debug", "train.seed=1", "--extend")
    assert_same_runs(study_dir, finished)
    assert sorted(task.label for task in tasks(study_dir, "train")) == ["train.seed=0", "train.seed=1"]


def test_a_study_without_its_journal_does_nothing_twice(finished, tmp_path):
    study_dir = tmp_path / "s"
    sweep(study_dir, "cluster=debug", *GRID)
    (study_dir / FILE).unlink()
    assert "3 done" in sweep(study_dir, "cluster=debug", *GRID)
    assert {report(study_dir, task).attempts for task in tasks(study_dir, "train")} == {1}


LAUNCHER = """
import sys
from pathlib import Path
from hpc_c2g.studies.launcher import launching
with launching(Path(sys.argv[1])):
    print("launching", flush=True)
    sys.stdin.read()
"""


def test_a_second_launcher_is_refused_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        launch.sweep, "launching", functools.partial(launching, wait=0.1)
    )  # not as long as a user waits
    study_dir = tmp_path / "s"
    pipe, command = subprocess.PIPE, [sys.executable, "-c", LAUNCHER, str(study_dir)]
    with subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdout.readline() == "launching\n"
        out = sweep(study_dir, "cluster=debug", code=2)
        assert "is in use by" in out
        assert f"process {first.pid}" in out
        assert not (study_dir / FILE).exists()
        first.communicate()
    assert first.returncode == 0


def test_cancelled_runs_stop_saved_and_stay_so_until_the_next_sweep(finished, tmp_path):
    study_dir = fitted(finished, tmp_path / "s")
    process = start("sweep", *SMALL, f"study_dir={study_dir}", "cluster=local", "steps=2000")
    wait_for(lambda: steps(study_dir) > 4)
    assert "cancelled: 1 tasks" in c2g("cancel", study_dir)
    process.communicate(timeout=90)
    assert states(study_dir)["train"] == ["cancelled"]
    (task,) = tasks(study_dir, "train")
    assert report(study_dir, task).state == "interrupted"
    assert "saved after step" in report(study_dir, task).cause


def test_status_lists_every_task_as_json(finished):
    answer = status(finished)
    assert answer["counts"] == {"classifier": {"done": 1}, "train": {"done": 2}}
    assert [t["step"] for t in answer["tasks"]] == [None, 4, 4]
    assert all(t["residual"] > 0 for t in answer["tasks"][1:])
    assert answer["warning"] is None


def test_a_long_fit_logs_its_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.0)
    values = {
        "out": "???",
        "data": {"name": "digits", "classes": [0, 1], "train_size": 20},
        "model": {"_target_": "mlp", "width": 20},
        "fit": {"name": "margin", "target_margin": 5.0},
    }
    load_stage("classifier")(tmp_path, SimpleNamespace(config=values, folder="classifiers/c"))
    assert "fitting the classifier: step 50, smoothed margin" in capsys.readouterr().out


def test_status_needs_no_torch():
    code = "import sys; import launch.status; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0


def test_results_are_collected_into_tables(finished):
    out = c2g("collect", finished)
    assert "results.md" in out
    content = json.loads((finished / "results.json").read_text())
    assert [run["train.seed"] for run in content["runs"]] == [0, 1]
    assert content["groups"][0]["runs"] == 2
    assert (finished / "results.csv").read_text().splitlines()[0].startswith("id,train.seed")
    assert "| runs |" in (finished / "results.md").read_text()


MISTAKES = [
    (("study=nope",), "study=nope is unknown"),
    (("cluster=nope",), "there is no Slurm profile 'nope'"),
    (("only=some",), "only=some is unknown"),
    (("parallel=0",), "parallel=0"),
    (("retries=-1",), "retries=-1"),
    (("profile.partition=x",), "profile.partition is set, but cluster=local has no profile"),
    (("--color",), "--color is unknown"),
    (("seed=",), "the grid of seed is empty"),
    (("nodes=2", "cluster=debug"), "cluster=debug runs in one process"),
    (("study_dir=/proc/x",), "cannot write"),
]


@pytest.mark.parametrize(("more", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_begun(tmp_path, more, message):
    arguments = [a for a in SMALL if not any(a.split("=")[0] == m.split("=")[0] for m in more)]
    if not any(m.startswith("study_dir") for m in more):
        arguments.append(f"study_dir={tmp_path / 's'}")
    out = c2g("sweep", *arguments, *more, code=2)
    (line,) = [line for line in out.splitlines() if line.strip()]
    assert line.startswith("c2g sweep: error: ")
    assert message in line
    assert not list(tmp_path.glob("s/runs/*/metrics.jsonl"))


@pytest.mark.parametrize("name", ["a$(touch x)b", "a'b", 'a"b', "a`b`", "a%jb", "a\\b"])
def test_a_folder_that_a_shell_or_slurm_would_interpret_is_refused_before_anything_is_written(tmp_path, name):
    for more in ([], ["--dry-run"]):
        out = c2g("sweep", *SMALL, "--study-dir", f"{tmp_path}/{name}", "cluster=local_slurm", *more, code=2)
        assert "which Slurm or the shell interprets" in out
    assert list(tmp_path.iterdir()) == []
