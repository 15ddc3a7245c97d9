"""Laws of the doctor on a real Slurm: a healthy cluster has no error, and each fault is one line with its hint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster

pytestmark = pytest.mark.slurm


def findings(study: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    """Exit code and results of ``c2g doctor``."""
    command = [sys.executable, "-m", "launch", "doctor", f"study_dir={study}", "cluster=local_slurm", "--json"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200, cwd=root)
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    assert (answer["errors"] > 0) == (done.returncode == 1)
    return done.returncode, answer["findings"]


def errors(study: Path, *arguments: str) -> list[str]:
    """Errors of ``c2g doctor``, each with its hint."""
    _, found = findings(study, *arguments)
    wrong = [f for f in found if f["status"] == "error"]
    assert all(f["hint"] for f in wrong)
    return [f"{f['message']} -- {f['hint']}" for f in wrong]


@contextmanager
def hidden_on(cluster: Cluster, node: str, folder: Path) -> Iterator[None]:
    """Within, the node has an empty folder of its own in the place of this one."""
    outside = (cluster.folder / "run" / "pids" / node).read_text().split()[0]
    first = Path(f"/proc/{outside}/task/{outside}/children").read_text().split()[0]  # of the node's own processes
    enter = ["nsenter", f"--target={first}", "--mount", "--pid"]
    subprocess.run([*enter, "mount", "-t", "tmpfs", "none", folder], check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run([*enter, "umount", "--lazy", folder], check=True, timeout=20)


def test_a_healthy_cluster_has_no_fault(cluster, tmp_path):
    code, found = findings(tmp_path / "study", "--job", "nodes=2")
    assert code == 0
    assert {f["status"] for f in found} <= {"ok", "warning"}
    text = " ".join(f["message"] for f in found if f["status"] == "ok")
    for word in ("is UP", "partition main is up", "sbatch accepts the script", "all-reduce of 2 ranks is right"):
        assert word in text
    nodes = 2 if cluster.namespaces else 1  # by their names
    assert f"{nodes} nodes read and write" in text
    assert not cluster.run("squeue", "-h", "--states=PD,R").strip()
    assert not (tmp_path / "study").exists()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["profile.partition=mian"], ["partition=mian does not exist", "did you mean main?"]),
        (["profile.cpus_per_task=999"], ["asks for 999 CPUs", "profile.cpus_per_task="]),
        (["profile.mem_gb=999"], ["asks for 1022976 MiB", "profile.mem_gb="]),
        (["nodes=99"], ["99 are asked for"]),
        (["profile.constraint=nope"], ["sbatch refuses", "nvalid feature"]),
    ],
)
def test_what_the_cluster_does_not_have_is_one_line(tmp_path, arguments, words):
    (line,) = errors(tmp_path, "--job", *arguments)  # no job is sent that could never start
    for word in words:
        assert word in line


@pytest.mark.parametrize("node", [0, 1], ids=["first", "second"])
def test_a_folder_that_a_node_does_not_share_is_one_line(cluster, tmp_path, node):
    if not cluster.namespaces:
        pytest.skip("nodes without namespaces have no files of their own")
    first, second, *_ = cluster.nodes()
    name = (first, second)[node]
    with hidden_on(cluster, name, tmp_path):
        (line,) = errors(tmp_path, "--job", "nodes=2", f"profile.nodelist='{first},{second}'")
    assert f"study_dir={tmp_path} cannot be written from {name}:" in line
    assert f"profile.exclude={name}" in line


def test_a_job_that_waits_for_nodes_is_reported_and_cancelled(cluster, tmp_path):
    cluster.script("node.sh", "down", *cluster.nodes())
    before, waits = errors(tmp_path, "--job", "wait=3")
    assert "are in service" in before
    assert "did not start within 3 s" in waits
    assert "DOWN" in waits
    assert "sinfo -R" in waits
    assert not cluster.run("squeue", "-h", "--states=PD,R").strip()
