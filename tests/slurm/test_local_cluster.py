"""Laws of the local Slurm cluster, ``slurm/local``."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster

pytestmark = pytest.mark.slurm
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY")

DEFAULT = Path("/etc/slurm/slurm.conf")


@pytest.fixture
def namespaces(cluster: Cluster) -> None:
    if not cluster.namespaces:
        pytest.skip("nodes without namespaces are not cut off from this machine")


def submit(cluster: Cluster, script: str, folder: Path, *options: str) -> str:
    """The id of a new job; its script runs in ``folder``."""
    return cluster.run(
        "sbatch", "--parsable", f"--chdir={folder}", "--output=out", *options, f"--wrap={script}"
    ).strip()


def until(holds: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def await_file(path: Path) -> None:
    """Wait until a job has written something."""
    until(path.exists, str(path), 60)


def processes_with(*entries: str) -> dict[int, str]:
    """Command of each process that has one of the entries in its environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if set(entries) & set((process / "environ").read_text(errors="replace").split("\0")):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended, or is the kernel's
            continue
    return found


def other_hosts() -> list[str]:
    """The lines of /etc/hosts that belong to no cluster; clusters may come and go beside this one."""
    return [line for line in Path("/etc/hosts").read_text().splitlines() if "# c2g-slurm /" not in line]


def daemons(cluster: Cluster) -> dict[str, str]:
    """What is written down of each daemon."""
    return {record.name: record.read_text() for record in (cluster.folder / "run" / "pids").iterdir()}


def test_up_where_it_is_up_starts_nothing(cluster):
    before = daemons(cluster)
    assert "already up" in cluster.script("up.sh")
    assert daemons(cluster) == before


def test_up_refuses_other_settings_under_a_running_cluster(cluster):
    before, nodes = daemons(cluster), cluster.nodes()
    with pytest.raises(RuntimeError, match=r"other settings .*down\.sh first"):
        cluster.script("up.sh", CPUS=int(cluster.environment["C2G_SLURM_CPUS"]) + 1)
    assert (daemons(cluster), cluster.nodes()) == (before, nodes)
    assert "already up" in cluster.script("up.sh")


def test_up_brings_back_what_has_died(cluster):
    before = daemons(cluster)
    dead = ["slurmctld", next(iter(cluster.nodes()))]
    for name in dead:
        os.kill(int(before[name].split()[0]), signal.SIGKILL)
    cluster.script("up.sh")
    assert set(cluster.nodes().values()) == {"idle"}
    after = daemons(cluster)
    assert {name for name in before | after if before.get(name) != after.get(name)} == set(dead)


@pytest.mark.usefixtures("namespaces")
def test_every_task_sees_the_name_of_its_node(cluster, tmp_path):
    nodes = list(cluster.nodes())
    say = "srun bash -c 'echo $SLURMD_NODENAME $(hostname)'"
    job = submit(cluster, say, tmp_path, f"--nodes={len(nodes)}", "--ntasks-per-node=2")
    assert cluster.wait(job, *ENDED) == "COMPLETED"
    said = (tmp_path / "out").read_text().splitlines()
    assert sorted(said) == sorted(f"{node} {node}" for node in nodes * 2)


@pytest.mark.usefixtures("namespaces")
def test_the_job_of_a_killed_node_is_requeued_and_ends_elsewhere(cluster, tmp_path):
    again = 'echo $SLURMD_NODENAME >>nodes; [ "${SLURM_RESTART_COUNT:-0}" = 1 ] || sleep 600'
    token = f"C2G_TEST={tmp_path}"
    job = submit(cluster, again, tmp_path, f"--export=ALL,{token}")
    await_file(tmp_path / "nodes")
    assert processes_with(token)
    lost = (tmp_path / "nodes").read_text().strip()
    cluster.kill_node(lost)
    assert processes_with(token) == {}
    assert cluster.nodes()[lost].startswith("down")
    assert cluster.wait(job, *ENDED) == "COMPLETED"
    first, second = (tmp_path / "nodes").read_text().split()
    assert first == lost != second


def test_after_resume_all_nodes_are_idle_and_take_jobs(cluster, tmp_path):
    nodes = cluster.nodes()
    killed, declared, *_ = nodes
    cluster.script("node.sh", "kill", killed)
    cluster.script("node.sh", "down", declared)
    assert [cluster.nodes()[name] for name in (killed, declared)] == ["down", "down"]
    cluster.resume_nodes()
    assert cluster.nodes() == dict.fromkeys(nodes, "idle")
    job = submit(cluster, "true", tmp_path, f"--nodes={len(nodes)}")
    assert cluster.wait(job, *ENDED) == "COMPLETED"


@pytest.mark.parametrize("kill", [False, True], ids=["in order", "killed"])
def test_a_running_job_outlives_a_restart_of_the_controller(cluster, tmp_path, kill):
    job = submit(cluster, "echo start >>starts; until [ -e go ]; do sleep 0.1; done", tmp_path)
    await_file(tmp_path / "starts")
    if kill:  # what was not saved yet would be lost
        note = f"saved after the start {tmp_path}"
        cluster.run("scontrol", "update", f"jobid={job}", f"comment={note}")
        saved = cluster.folder / "state" / "job_state"
        until(lambda: saved.exists() and note.encode() in saved.read_bytes(), "the state of slurmctld", 60)
    before = daemons(cluster)
    cluster.restart_controller(kill=kill)
    after = daemons(cluster)
    assert {name for name in before if before[name] != after[name]} == {"slurmctld"}
    assert cluster.queue()[job] == "RUNNING"
    (tmp_path / "go").touch()
    assert cluster.wait(job, *ENDED) == "COMPLETED"
    assert (tmp_path / "starts").read_text() == "start\n"


@pytest.fixture
def no_default(cluster: Cluster) -> Iterator[None]:
    """Meanwhile the shared cluster is not this machine's default one."""
    ours = DEFAULT.is_symlink() and DEFAULT.readlink() == cluster.folder / "etc" / "slurm.conf"
    if ours:
        DEFAULT.unlink()
    yield
    if ours and not DEFAULT.is_symlink():
        DEFAULT.symlink_to(cluster.folder / "etc" / "slurm.conf")


@pytest.mark.usefixtures("no_default")
def test_down_leaves_no_process_and_no_trace(tmp_path):
    free = not DEFAULT.exists()
    hosts = other_hosts()
    folder = Path(tempfile.mkdtemp(prefix="c2g-slurm-", dir="/tmp"))
    other = Cluster.start(folder, NODES=1)
    marks = f"C2G_SLURM_MARK={folder}", f"C2G_TEST={tmp_path}"
    try:
        submit(other, "touch started; sleep 600", tmp_path, f"--export=ALL,{marks[1]}")
        await_file(tmp_path / "started")
        assert all(processes_with(mark) for mark in marks)
        assert f"n1 # c2g-slurm {folder}\n" in Path("/etc/hosts").read_text()
        assert not free or DEFAULT.resolve().is_relative_to(folder)
    finally:
        other.stop()
    assert processes_with(*marks) == {}
    assert other_hosts() == hosts
    assert str(folder) not in Path("/etc/hosts").read_text()
    assert not DEFAULT.resolve().is_relative_to(folder)
    assert not folder.exists()
