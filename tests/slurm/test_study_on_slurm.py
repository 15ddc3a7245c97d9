"""Laws of a study on a real Slurm: whatever the cluster does to its jobs, each run is done once, to the bits of the undisturbed one."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster
from helpers.studies import assert_same_runs, c2g, report, states, status, steps, sweep, tasks, wait_for

from hpc_c2g.studies.journal import FILE
from hpc_c2g.studies.task_status import read_statuses

pytestmark = pytest.mark.slurm
ON_SLURM = ("cluster=local_slurm", "profile.signal_seconds=30")
SLOW = ("steps=1500", "checkpoint.every=100", "log.every=25", "deterministic_shards=1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The slow study, run by one process."""
    study_dir = tmp_path_factory.mktemp("studies") / "undisturbed"
    sweep(study_dir, "cluster=debug", *SLOW)
    return study_dir


def active(cluster: Cluster) -> set[str]:
    """Jobs that wait or run."""
    return {job for job, state in cluster.queue().items() if state in ("PENDING", "RUNNING", "COMPLETING")}


def finish(study_dir: Path, *more: str) -> None:
    sweep(study_dir, *ON_SLURM, "--watch", *more)


def job_of_training(study_dir: Path) -> str:
    (job,) = [s.job for s in read_statuses(study_dir, None) if s.task.stage == "train"]
    return job


def test_arrays_wait_for_those_that_they_depend_on_and_a_second_sweep_submits_nothing(cluster: Cluster, tmp_path: Path):
    study_dir = tmp_path / "a study"  # blanks in names reach Slurm
    grid = ("train.seed=0,1",)
    out = sweep(study_dir, *ON_SLURM, *grid)
    assert "3 tasks submitted as 2 jobs" in out
    again = sweep(study_dir, *ON_SLURM, *grid)
    assert "0 tasks submitted" in again
    for folder in (study_dir / "submissions").iterdir():
        assert folder.stat().st_mode & 0o077 == 0
        assert all(f.stat().st_mode & 0o077 == 0 for f in folder.glob("*.pkl"))
    cluster.idle(120)
    assert states(study_dir) == {"classifier": ["done"], "train": ["done", "done"]}
    assert {report(study_dir, task).attempts for task in tasks(study_dir, "train")} == {1}
    printed = c2g("logs", study_dir / tasks(study_dir, "train")[0].folder)
    assert "Job completed successfully" in printed


def test_a_preempted_run_is_the_undisturbed_run_bitwise(cluster: Cluster, tmp_path: Path, undisturbed: Path):
    study_dir = tmp_path / "s"
    sweep(study_dir, *ON_SLURM, "profile.partition=low", *SLOW)
    wait_for(lambda: steps(study_dir) > 8)
    job = job_of_training(study_dir)
    node = cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    wrap = ["-p", "high", "-N1", "-c4", f"--nodelist={node}", "-o", "/dev/null", "--wrap", "sleep 3"]
    cluster.run("sbatch", *wrap)
    wait_for(lambda: states(study_dir)["train"] != ["running"])
    finish(study_dir, "profile.partition=low", *SLOW)
    found = report(study_dir, tasks(study_dir, "train")[0])
    assert found.attempts == 2
    assert found.failures == 0
    assert found.history[0]["outcome"] == "interrupted"
    assert "saved after step" in found.history[0]["cause"]
    assert_same_runs(study_dir, undisturbed)


def test_a_run_whose_node_dies_resumes_elsewhere_to_the_same_bits(cluster: Cluster, tmp_path: Path, undisturbed: Path):
    study_dir = tmp_path / "s"
    sweep(study_dir, *ON_SLURM, *SLOW)
    wait_for(lambda: steps(study_dir) > 8)
    node = report(study_dir, tasks(study_dir, "train")[0]).node
    cluster.kill_node(node)
    finish(study_dir, *SLOW)
    found = report(study_dir, tasks(study_dir, "train")[0])
    assert (found.attempts, found.failures) == (2, 0)
    assert found.node != node
    assert_same_runs(study_dir, undisturbed)


def test_a_task_that_is_killed_is_named_and_tried_again_in_the_same_job(
    cluster: Cluster, tmp_path: Path, undisturbed: Path
):
    study_dir = tmp_path / "s"
    sweep(study_dir, *ON_SLURM, *SLOW)
    wait_for(lambda: steps(study_dir) > 8)
    pids = subprocess.run(["pgrep", "-f", f"_submit {study_dir}"], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-9", *pids], check=False)
    finish(study_dir, *SLOW)
    found = report(study_dir, tasks(study_dir, "train")[0])
    assert (found.attempts, found.failures) == (2, 1)
    assert "SIGKILL" in found.history[0]["cause"]
    assert_same_runs(study_dir, undisturbed)


def test_a_poisoned_run_does_not_block_the_array_and_is_given_up_after_its_retries(cluster: Cluster, tmp_path: Path):
    study_dir = tmp_path / "s"
    out = sweep(study_dir, *ON_SLURM, "--watch", "fit.max_steps=1,100000", "retries=1", code=1)
    assert "fit.max_steps=1 passed" in out
    assert states(study_dir) == {"classifier": ["failed", "done"], "train": ["blocked", "done"]}
    assert report(study_dir, tasks(study_dir, "classifier")[0]).attempts == 2


def test_a_submission_whose_launcher_was_killed_is_found_again(cluster: Cluster, tmp_path: Path):
    study_dir = tmp_path / "s"
    sweep(study_dir, *ON_SLURM, *SLOW)
    file = study_dir / FILE
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["event"] != "submitted"]  # as between sbatch and its answer
    assert len(kept) == len(lines) - 2
    file.write_text("".join(kept))
    assert "0 tasks submitted" in sweep(study_dir, *ON_SLURM, *SLOW)
    assert len(active(cluster)) == 2


def test_cancelled_jobs_do_not_come_back_by_themselves(cluster: Cluster, tmp_path: Path):
    study_dir = tmp_path / "s"
    sweep(study_dir, *ON_SLURM, *SLOW)
    wait_for(lambda: steps(study_dir) > 8)
    c2g("cancel", study_dir)
    cluster.idle(60)
    time.sleep(8)  # a requeued job would be back by now
    assert active(cluster) == set()
    assert states(study_dir)["train"] == ["cancelled"]
    assert "saved after step" in report(study_dir, tasks(study_dir, "train")[0]).cause
    assert "1 tasks submitted" in sweep(study_dir, *ON_SLURM, *SLOW)


def test_two_nodes_of_two_tasks_give_the_run_of_one_process(cluster: Cluster, tmp_path: Path):
    study_dir = tmp_path / "s"
    more = ("deterministic=false", "steps=10")
    sweep(study_dir, *ON_SLURM, "--watch", "nodes=1,2", "tasks_per_node=2", *more)
    sweep(tmp_path / "one", "cluster=debug", *more)
    (one,) = tasks(tmp_path / "one", "train")
    for task in tasks(study_dir, "train"):
        mine, theirs = (
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (study_dir / task.folder, tmp_path / "one" / one.folder)
        )
        assert [m["step"] for m in mine] == [t["step"] for t in theirs]
        assert [m["stationarity"] for m in mine] == pytest.approx([t["stationarity"] for t in theirs], rel=1e-4)
    assert {task.nodes for task in tasks(study_dir, "train")} == {1, 2}


def test_what_sbatch_refuses_is_one_line_and_nothing_is_submitted(cluster: Cluster, tmp_path: Path):
    for field, words in (("partition=nowhere", "partition"), ("cpus_per_task=64", "not available")):
        out = sweep(tmp_path / "s", *ON_SLURM, f"profile.{field}", code=2)
        (line,) = [line for line in out.splitlines() if line.strip()]
        assert "sbatch refuses" in line
        assert words in line.lower()
    assert active(cluster) == set()


def test_status_warns_where_slurm_does_not_answer(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study_dir = tmp_path / "s"
    sweep(study_dir, *ON_SLURM)
    cluster.idle(120)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "nowhere.conf"))
    assert "Slurm does not answer" in status(study_dir)["warning"]
    assert states(study_dir) == {"classifier": ["done"], "train": ["done"]}
