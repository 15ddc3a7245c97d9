"""Laws of the doctor: each fault is reported once, with its value and a hint, and a healthy cluster has no error."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tables import offenders

import launch.doctor
from hpc_c2g.distributed.environment import LaunchEnvironment
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.preflight import cluster, devices, exchange, host, node_job, node_probe, study_folder
from hpc_c2g.preflight.check_result import CheckResult
from hpc_c2g.preflight.cluster import check_slurm
from hpc_c2g.preflight.cluster_checks import count_gpus, in_service, parse_minutes
from hpc_c2g.preflight.job_checks import Job
from hpc_c2g.preflight.node_checks import LoginNode, check_job, clock_skew
from hpc_c2g.preflight.study_folder import FolderProbe, check_study_folder
from hpc_c2g.scheduling.batch_script import Shape, sbatch_text
from hpc_c2g.scheduling.profile import SlurmProfile
from hpc_c2g.scheduling.programs import Answer, query

PROFILE = SlurmProfile(
    name="c", partition="main", account="physics", qos="normal", cpus_per_task=2, mem_gb=4, python=sys.executable
)
CONFIG = "AccountingStorageEnforce = associations,limits,qos\nClusterName             = c2g\nMaxArraySize            = 1001\n"
PARTITIONS = (
    "PartitionName=main AllowQos=ALL Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED Nodes=n[1-3] State=UP TotalNodes=3\n"
    "PartitionName=gpu AllowQos=ALL Default=NO MaxNodes=2 MaxTime=1-12:00:00 Nodes=g1 State=UP TotalNodes=1\n"
    "PartitionName=old AllowQos=ALL Default=NO MaxNodes=2 MaxTime=30:00 Nodes=n1 State=DOWN TotalNodes=1\n"
)
NODE = (
    "NodeName={} CPUEfctv=4 CPUTot=4 Gres={} OS=Linux 6.1 #1 SMP  RealMemory=16000 State={} Partitions={} BootTime=1\n"
)
NODES = (
    NODE.format("n1", "(null)", "IDLE", "main,old")
    + NODE.format("n2", "(null)", "MIXED", "main")
    + NODE.format("n3", "(null)", "DOWN*", "main")
    + NODE.format("g1", "gpu:a100:4(S:0-1),gpu:v100:1", "ALLOCATED", "gpu")
)
TAKEN = "sbatch: Job 9 to start at 2026-11-25T10:52:20 using 2 processors on nodes n1 in partition main"


class Slurm:
    """Fake programs in a folder that is all of PATH but for the system's; ``texts`` are their answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers(config=CONFIG, partition=PARTITIONS, node=NODES, ping="Slurmctld(primary) at vm is UP\n", job="")
        self.has(
            "scontrol",
            'case "$*" in *hostnames*) echo "${@: -1}" | tr , "\\n";; ping) cat ping.txt;;'
            ' *"show job"*) cat job.txt;; *) cat "${@: -1}".txt;; esac',
        )
        self.answers(sacctmgr="physics||normal,long\nbiology||normal\n", sbatch=TAKEN)
        self.has("sacctmgr", "cat sacctmgr.txt")
        self.accepts()
        for program in ("srun", "squeue", "scancel", "sacct"):
            self.has(program, "")

    def has(self, program: str, body: str) -> None:
        file = self.folder / program
        file.write_text(f'#!/bin/bash\ncd {self.folder}\necho "$@" >> {program}.calls\n{body}\n')
        file.chmod(0o755)

    def answers(self, **texts: str) -> None:
        for name, text in texts.items():
            (self.folder / f"{name}.txt").write_text(text)

    def accepts(self) -> None:
        self.has("sbatch", 'cp "${@: -1}" script; cat sbatch.txt >&2')

    def refuses(self, text: str) -> None:
        self.has("sbatch", f'echo "{text}" >&2; exit 1')

    @contextmanager
    def without(self, program: str) -> Iterator[None]:
        file = self.folder / program
        away = file.rename(self.folder / f"{program}.away")
        try:
            yield
        finally:
            away.rename(file)

    def calls(self, program: str) -> list[str]:
        file = self.folder / f"{program}.calls"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    tools = tmp_path / "tools"  # the real Slurm may be in /usr/bin
    tools.mkdir()
    for name in ("bash", "cat", "cp", "tr", "sleep", "env"):
        (tools / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", f"{folder}:{tools}")
    for name in [n for n in os.environ if n.startswith("SBATCH_")]:
        monkeypatch.delenv(name)
    return Slurm(folder)


ONE = Shape()


def asked(profile: SlurmProfile = PROFILE, shape: Shape = ONE, **options) -> list[CheckResult]:
    return check_slurm(profile, shape, Path("/runs/study"), **options)[0]


def bad(found: list[CheckResult]) -> list[CheckResult]:
    return [f for f in found if f.status != "ok"]


def the_only(found: list[CheckResult], status: str, *words: str) -> CheckResult:
    """The only result that is not ok: of this status, with these words, and with a hint."""
    assert len(bad(found)) == 1, bad(found)
    (one,) = bad(found)
    assert one.status == status, one
    assert one.hint, one
    for word in words:
        assert word in f"{one.message} -- {one.hint}", f"{word!r} is missing in {one}"
    return one


# --- asking Slurm ---------------------------------------------------------------------------------------------------------


def test_a_healthy_cluster_has_results_that_are_all_ok(slurm):
    found = asked()
    assert bad(found) == []
    text = " ".join(f.message for f in found)
    for word in ("sbatch", "is UP", "partition main is up", "account physics, qos normal", "2 nodes", "Job 9 to start"):
        assert word in text


def test_sbatch_is_asked_about_the_very_script_of_a_run(slurm):
    shape = Shape(2, 2)
    asked(shape=shape)
    assert (slurm.folder / "script").read_text() == sbatch_text(PROFILE, shape, "c2g-doctor", Path("/runs/study"))
    (call,) = slurm.calls("sbatch")
    assert call.startswith("--test-only ")


def test_a_missing_program_of_slurm_is_an_error(slurm):
    for program in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        with slurm.without(program):
            found, startable = check_slurm(PROFILE, ONE, Path("/runs"))
            the_only(found, "error", f"not on PATH: {program}", "login node")
            assert not startable


def test_missing_accounting_is_unknown_and_no_error(slurm):
    for program, word in (("sacct", "without a report"), ("sacctmgr", "account and qos")):
        with slurm.without(program):
            the_only(asked(), "unknown", f"{program} is not on PATH", word)


def test_accounting_that_does_not_answer_is_unknown(slurm):
    slurm.has("sacctmgr", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    the_only(asked(), "unknown", "could not be checked", "storage is disabled", "sbatch checks them")


def test_nothing_else_is_asked_if_the_controller_is_down(slurm):
    for body in ("echo 'Slurmctld(primary) at vm is DOWN'; exit 1", "echo 'Unable to contact' >&2; exit 1"):
        slurm.has("scontrol", body)
        found, startable = check_slurm(PROFILE, Shape(), Path("/runs"))
        the_only(found, "error", "the controller does not answer", "administrators")
        assert not startable
    assert slurm.calls("sbatch") == []


def test_a_program_that_hangs_is_no_answer(slurm):
    slurm.has("scontrol", "exec sleep 30")
    begin = time.monotonic()
    the_only(asked(seconds=0.3), "error", "scontrol took more than 0.3 s")
    assert time.monotonic() - begin < 10


def test_an_sbatch_that_hangs_is_unknown(slurm):
    slurm.has("sbatch", "exec sleep 60")
    the_only(asked(seconds=0.5), "unknown", "sbatch --test-only took more than 1.5 s", "try again")


def test_no_shell_reads_a_name(slurm, tmp_path):
    assert query("scontrol", "show", "hostnames", f"$(touch {tmp_path}/x);n1").output
    assert not (tmp_path / "x").exists()


def test_output_formats_of_the_user_do_not_change_the_answer(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_CONF", "/a")
    slurm.has("scontrol", "env")
    output = query("scontrol").output
    assert "SLURM_CONF=/a" in output
    assert "SLURM_TIME_FORMAT" not in output


def test_a_variable_that_overrides_the_script_is_a_warning(slurm, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    the_only(asked(), "warning", "SBATCH_PARTITION=debug", "unset SBATCH_PARTITION")


UNFIT: list[tuple[dict, str, list[str]]] = [
    ({"partition": "mian"}, "error", ["partition=mian does not exist", "did you mean main?", "main, gpu, old"]),
    ({"partition": "main,nope"}, "error", ["partition=nope does not exist"]),
    ({"partition": "old", "time_minutes": 20}, "error", ["partition=old is DOWN", "profile.partition=NAME"]),
    ({"partition": "main,old"}, "warning", ["partition=old is DOWN"]),
    ({"account": "chemistry"}, "error", ["account=chemistry is not one of yours", "physics, biology"]),
    ({"qos": "short"}, "error", ["qos=short is not allowed for account physics", "normal, long"]),
    ({"account": "biology", "qos": "long"}, "error", ["qos=long is not allowed for account biology", "normal"]),
    ({"cpus_per_task": 5}, "error", ["asks for 5 CPUs", "cpus_per_task=5 x 1", "at most 4", "cpus_per_task=4"]),
    ({"mem_gb": 20}, "error", ["asks for 20480 MiB", "mem_gb=20 x 1", "at most 16000", "profile.mem_gb=15.6"]),
    ({"gpus_per_task": 1}, "error", ["asks for 1 GPUs", "gpus_per_task=1", "at most 0"]),
    (
        {"partition": "gpu", "gpus_per_task": 2, "gpu_type": "v100"},
        "error",
        ["asks for 2 GPUs", "of type v100", "at most 1", "profile.gpus_per_task=1"],
    ),
    ({"partition": "gpu", "time_minutes": 2161}, "error", ["time_minutes=2161", "gpu allows (2160)", "=2160"]),
    ({"max_array": 1002}, "error", ["max_array=1002", "MaxArraySize (1001)", "profile.max_array=1000"]),
    ({"nodelist": "n1,n9"}, "error", ["nodelist=n1,n9", "n9 is not in main", "profile.nodelist=null"]),
    ({"exclude": "n1,n2"}, "error", ["0 of 1 nodes", "in service", "n3 down*", "sinfo -R"]),
]
JUST_FIT: list[tuple[dict]] = [
    ({"partition": None},),
    ({"account": None, "qos": None},),
    ({"account": "Physics"},),
    ({"qos": "long"},),
    ({"cpus_per_task": 4, "mem_gb": 15.6},),
    ({"mem_gb": 0},),
    ({"mem_gb": None},),
    ({"partition": "gpu", "gpus_per_task": 4, "gpu_type": "A100", "time_minutes": 2160},),
    ({"partition": "gpu", "gpus_per_task": 5},),
    ({"max_array": 1001},),
    ({"nodelist": "n1"},),
    ({"exclude": "n1"},),
]


def test_a_profile_that_does_not_fit_the_cluster_is_reported_once(slurm):
    def check(change: dict, status: str, words: list[str]) -> None:
        if status == "error":
            slurm.refuses("allocation failure: Requested node configuration is not available")  # the same fault again
        else:
            slurm.accepts()
        the_only(asked(replace(PROFILE, **change)), status, *words)

    assert offenders(UNFIT, check) == []


@pytest.mark.usefixtures("slurm")
def test_a_profile_that_just_fits_has_no_error():
    def check(change: dict) -> None:
        assert bad(asked(replace(PROFILE, **change))) == []

    assert offenders(JUST_FIT, check) == []


def test_more_nodes_than_a_partition_allows_or_has_are_an_error(slurm):
    slurm.refuses("Requested node configuration is not available")
    the_only(asked(replace(PROFILE, partition="main"), Shape(4)), "error", "3 nodes of main", "4 are asked for")
    the_only(asked(replace(PROFILE, partition="main"), Shape(3)), "error", "2 of 3 nodes", "3 needed", "n3 down*")
    found = asked(replace(PROFILE, partition="gpu"), Shape(3))
    assert any("nodes=3 is more than gpu allows a job (2)" in f.message for f in found)


def test_ranks_of_a_node_count_together(slurm):
    slurm.refuses("no")
    the_only(asked(shape=Shape(1, 3)), "error", "asks for 6 CPUs", "cpus_per_task=2 x 3", "tasks_per_node=2")


def test_nodes_out_of_service_do_not_keep_a_job_from_being_submitted_but_other_errors_do(slurm):
    slurm.answers(node=NODES.replace("IDLE", "DRAIN").replace("MIXED", "DOWN"))
    slurm.refuses("Requested node configuration is not available")
    found, startable = check_slurm(PROFILE, Shape(), Path("/runs"))
    the_only(found, "error", "0 of 3 nodes", "n1 drain, n2 down, n3 down*")
    assert startable
    assert not check_slurm(replace(PROFILE, cpus_per_task=5), Shape(), Path("/runs"))[1]


def test_without_enforcement_an_account_is_a_warning(slurm):
    slurm.answers(config=CONFIG.replace("associations,limits,qos", "none"))
    the_only(asked(replace(PROFILE, account="chemistry")), "warning", "account=chemistry", "not enforce")
    slurm.answers(sacctmgr="")
    the_only(asked(), "warning", "no account", "not enforce")
    assert bad(asked(replace(PROFILE, account=None, qos=None))) == []


def test_a_user_without_an_account_is_an_error(slurm):
    slurm.answers(sacctmgr="")
    the_only(asked(), "error", "no account on this cluster", "administrators")


def test_a_cluster_without_a_default_partition_wants_one_named(slurm):
    slurm.answers(partition=PARTITIONS.replace("Default=YES", "Default=NO"))
    slurm.refuses("No partition specified or system default partition")
    the_only(asked(replace(PROFILE, partition=None)), "error", "no default partition", "main, gpu, old")


def test_the_answer_of_sbatch_overrides_the_check_of_nodes(slurm):
    slurm.refuses("sbatch: error: Batch job submission failed: Invalid feature specification")
    the_only(asked(), "error", "sbatch refuses the script: Batch job submission failed: Invalid feature", "sinfo")
    slurm.accepts()
    the_only(asked(replace(PROFILE, cpus_per_task=5)), "unknown", "asks for 5 CPUs", "but sbatch accepts it")
    the_only(asked(replace(PROFILE, max_array=2000)), "error", "max_array")  # which `sbatch --test-only` does not check


def test_times_and_gpus_are_read_as_slurm_writes_them():
    for text, right in {
        "2-12:00:00": 3600,
        "01:30:00": 90,
        "30:00": 30,
        "00:00:30": 0.5,
        "UNLIMITED": None,
        "": None,
    }.items():
        assert parse_minutes(text) == right, text
    for gres, kind, number in [
        ("gpu:4", None, 4),
        ("gpu:a100:4(S:0-1),gpu:1g.5gb:7,shard:32", None, 11),
        ("gpu:a100:4(S:0-1),gpu:1g.5gb:7", "1g.5gb", 7),
        ("(null)", None, 0),
        ("mygpu:3,nic:2", None, 0),
        ("gpu:4", "a100", 0),
    ]:
        assert count_gpus(gres, kind) == number, gres


def test_states_in_service():
    for state in ("IDLE", "MIXED+CLOUD", "ALLOCATED", "COMPLETING", "IDLE+PLANNED", "IDLE+CLOUD+POWERED_DOWN"):
        assert in_service(state), state
    for state in ("DOWN", "IDLE+DRAIN", "MIXED*", "DOWN+NOT_RESPONDING", "IDLE+FAIL", "FUTURE"):
        assert not in_service(state), state


# --- the folder -----------------------------------------------------------------------------------------------------------


def test_a_good_folder_is_ok_and_left_as_it_was(tmp_path):
    folder = tmp_path / "a" / "study"
    found = check_study_folder(folder, slurm=True)
    assert [f.status for f in found if "study_dir" in f.message and "GiB free" not in f.message] == []
    assert "files and hard links work" in found[0].message
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    (folder / "study.yaml").touch()
    check_study_folder(folder, slurm=True)
    assert [p.name for p in folder.iterdir()] == ["study.yaml"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    the_only(
        check_study_folder(tmp_path / "file" / "study", slurm=False), "error", "cannot be written", "another study_dir"
    )
    the_only(check_study_folder(Path("/proc/study"), slurm=False), "error", "cannot be written")


def test_a_path_that_slurm_would_read_as_a_pattern_is_an_error(tmp_path):
    the_only(check_study_folder(tmp_path / "a%j", slurm=True), "error", "'%'", "choose a folder without it")


def test_a_file_system_that_hangs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(study_folder, "probe_folder", lambda _: time.sleep(30))
    begin = time.monotonic()
    the_only(check_study_folder(tmp_path, slurm=False, seconds=0.2), "error", "does not answer within 0.2 s")
    assert time.monotonic() - begin < 10


HEALTHY = FolderProbe(free_bytes=1 << 40, free_files=10**6)


def test_each_fault_of_a_folder_is_reported():
    def check(change: dict, status: str, words: list[str]) -> None:
        the_only(study_folder.check_probe(Path("/s"), replace(HEALTHY, **change)), status, *words)

    faults = [
        ({"free_bytes": 5 << 30}, "warning", ["5.0 GiB free", "free disk space"]),
        ({"free_bytes": 1 << 29}, "error", ["0.5 GiB free", "free disk space"]),
        ({"free_files": 5000}, "warning", ["5000 more files", "remove files"]),
        ({"free_files": 5}, "error", ["5 more files"]),
        ({"link_error": "Operation not permitted"}, "error", ["hard links", "not permitted", "another file system"]),
        ({"mode": 0o777}, "warning", ["world-writable (mode 777)", "chmod o-w /s"]),
        ({"write_error": "Disk quota exceeded"}, "error", ["Disk quota exceeded"]),
    ]
    assert offenders(faults, check) == []
    for change in ({}, {"free_files": None}, {"mode": 0o1777}, {"mode": 0o770}):
        assert bad(study_folder.check_probe(Path("/s"), replace(HEALTHY, **change))) == []


def test_a_file_system_without_hard_links_is_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    the_only(check_study_folder(tmp_path, slurm=False), "error", "no hard links (Operation not permitted)")
    assert list(tmp_path.iterdir()) == []


# --- this machine ---------------------------------------------------------------------------------------------------------


def test_this_machine_is_checked_for_torch_and_memory():
    assert host.check_torch(Answer(0, "2.9.0 0\n", ""), 5).message.endswith(", torch 2.9.0, 0 GPUs")
    broken = query(sys.executable, "-c", "raise ImportError('libcudart.so.12 is missing')")
    the_only([host.check_torch(broken, 5)], "error", "ImportError: libcudart.so.12 is missing", "pip install torch")
    the_only([host.check_torch(Answer(None, "", "python took more than 5 s"), 5)], "error", "within 5 s")
    meminfo = "MemTotal: 9 kB\nMemAvailable:    4194304 kB\n"
    assert host.check_memory(4, meminfo).status == "ok"
    the_only([host.check_memory(5, meminfo)], "warning", "5 cores, 4.0 GiB", "parallel=4")
    the_only([host.check_memory(1, meminfo, cgroup_free=1 << 29)], "error", "0.5 GiB", "too little")
    the_only([host.check_memory(1, "")], "unknown", "could not be read")


# --- what each rank does --------------------------------------------------------------------------------------------------


def test_a_rank_reports_every_part_and_gets_a_reply(tmp_path):
    (tmp_path / exchange.PLAN).write_text("{}")
    stop, answered = threading.Event(), {}

    def login() -> None:
        while not stop.wait(0.05):
            exchange.answer_pings(tmp_path, answered)

    thread = threading.Thread(target=login)
    thread.start()
    try:
        report = node_probe.probe_node(tmp_path)
    finally:
        stop.set()
        thread.join()
    (read,) = exchange.read_reports(tmp_path)
    assert read == json.loads(json.dumps(report))
    assert (read["rank"], read["size"], read["part"]) == (0, 1, "done")
    assert set(read["seconds"]) == {"files", "import", "devices", "sum"}
    gpus = read["gpus"]["count"]
    login_node = LoginNode(exchange.versions(), exchange.clock_offset(tmp_path))
    profile = replace(PROFILE, gpus_per_task=gpus)
    found = check_job(profile, Shape(), "/s", Job("1", "COMPLETED", shell_ok=True), login_node, [read])
    assert bad(found) == []
    assert len(found) == 5
    assert not list(tmp_path.glob(".*"))  # nothing half written, nothing left


def test_a_ping_without_a_reply_times_out(tmp_path):
    (tmp_path / "reply-a.json").write_text('{"token": "of an earlier attempt", "answered": 1.0}')
    reply = exchange.ping_login_node(tmp_path, "a", 0.3)
    assert (reply["answered"], reply["received"]) == (None, None)
    answered: dict[str, str] = {}
    exchange.answer_pings(tmp_path, answered)
    first = (tmp_path / "reply-a.json").read_text()
    exchange.answer_pings(tmp_path, answered)
    assert (tmp_path / "reply-a.json").read_text() == first  # once


def test_a_clock_is_compared_with_that_of_the_files(tmp_path, monkeypatch):
    assert abs(exchange.clock_offset(tmp_path)[0]) < 1
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 100)
    assert abs(exchange.clock_offset(tmp_path)[0] - 100) < 1


def test_scratch_is_where_it_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert node_probe.scratch_fault() == ""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert "missing: No such file" in node_probe.scratch_fault()


def test_a_package_that_cannot_be_imported_is_reported(tmp_path, monkeypatch):
    (tmp_path / exchange.PLAN).write_text('{"reply": 0.1}')
    monkeypatch.setattr(node_probe.importlib, "import_module", lambda _: exec("raise ImportError('no libcuda')"))
    report = node_probe.probe_node(tmp_path)
    assert (report["import_error"], report["part"], report["rank"]) == ("ImportError: no libcuda", "done", None)


def test_a_device_that_computes_wrong_results_is_reported(monkeypatch):
    assert devices.matmul_fault(torch.device("cpu")) == ""
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: real(t).index_fill(0, torch.tensor([3]), -1.0))
    assert devices.matmul_fault(torch.device("cpu")) == "256 of 65536 elements of a matrix product are wrong"
    if not torch.cuda.is_available():
        assert devices.matmul_fault(torch.device("cuda", 0))


def test_each_gpu_of_a_node_is_tried_by_one_of_its_ranks(monkeypatch):
    tried: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(devices, "matmul_fault", lambda device: tried.append(str(device)) or "")
    monkeypatch.setattr(devices, "ecc_errors", lambda: {"0 (x)": 2})
    found = [devices.probe_devices(rank, 2) for rank in range(2)]
    assert sorted(tried) == ["cpu", "cpu", *(f"cuda:{i}" for i in range(5))]
    assert [f["count"] for f in found] == [5, 5]
    assert [f["ecc"] for f in found] == [{"0 (x)": 2}, {}]


def test_memory_errors_are_counted_where_somebody_counts(slurm):
    assert devices.ecc_errors() == {}
    slurm.has("nvidia-smi", "printf '0, GPU-a, 0\\n1, GPU-b, 3\\n2, GPU-c, [N/A]\\n'")
    assert devices.ecc_errors() == {"0 (GPU-a)": 0, "1 (GPU-b)": 3}
    slurm.has("nvidia-smi", "exec sleep 30")
    assert devices.ecc_errors(0.2) == {}


def the_sum(world: World, stays_away: int) -> object:
    World.start = classmethod(lambda *_, **__: world)  # they have met already
    if world.rank == stays_away:
        time.sleep(3)
        return None
    return node_probe.meet_and_sum(world.launch, 5.0, 1.0)


def test_all_ranks_add_up(tmp_path):
    for kind, (ended, outcome) in run_ranks(2, tmp_path, the_sum, -1):
        assert (kind, ended, outcome["stage"], outcome["fault"], outcome["missing"]) == ("value", True, "done", "", [])


def test_a_sum_that_hangs_names_who_did_not_come(tmp_path):
    answers = run_ranks(3, tmp_path, the_sum, 1)
    for rank in (0, 2):
        kind, (ended, outcome) = answers[rank]
        assert (kind, ended, outcome["missing"]) == ("value", False, [1])
        assert outcome["fault"] == "ranks 1 did not join, the all-reduce did not end within 1 s"


def test_ranks_that_cannot_meet_say_so(monkeypatch):
    def missing(*_, **__):
        raise UserError("rank 3 of 4 did not come within 1 s", "look at its log")

    monkeypatch.setattr(World, "start", missing)
    ended, outcome = node_probe.meet_and_sum(LaunchEnvironment(), 1, 1)
    assert not ended
    assert (outcome["stage"], outcome["fault"]) == ("meet", "rank 3 of 4 did not come within 1 s -- look at its log")
    monkeypatch.setattr(World, "start", lambda *_, **__: time.sleep(30))
    ended, outcome = node_probe.meet_and_sum(LaunchEnvironment(), 0.1, 0.1)
    assert not ended
    assert "no connection to the other ranks" in outcome["fault"]


def test_the_shell_of_the_job_ends_with_the_code_of_its_ranks(tmp_path):
    done = subprocess.run([sys.executable, "-m", "hpc_c2g.preflight.node_probe", str(tmp_path), "7"], timeout=60)
    assert done.returncode == 7
    assert json.loads((tmp_path / exchange.EPILOG).read_text()) == {"code": 7}


# --- checking the reports --------------------------------------------------------------------------------------------------

VERSIONS = {"hpc_c2g": "0.1.0", "python": "3.11.2", "code": "abc", "torch": "2.9.0"}
SHAPE = Shape(2, 2)
DONE = Job("7", "COMPLETED", "None", "0:0", ("n1", "n2"), "n1", shell_ok=True, logs="/s/doctor/x")


def a_report(rank: int, /, **changes) -> dict:
    report = {
        "node": f"n{rank // 2 + 1}",
        "rank": rank,
        "size": 4,
        "part": "done",
        "seconds": {"import": 3.0},
        "versions": VERSIONS,
        "clock": [0.0, 0.001],
        "reply": {"sent": 100.0, "answered": 100.2, "received": 100.4},
        "scratch": "",
        "interfaces": ["lo", "ib0"],
        "gpus": {"count": 0, "faults": [], "built_for": "12.6", "cause": "", "ecc": {}},
        "sum": {"stage": "done", "fault": "", "missing": [], "seconds": 1.0},
    }
    return report | changes


def all_reports(**of_the_last) -> list[dict]:
    return [*(a_report(rank) for rank in range(3)), a_report(3, **of_the_last)]


def checked(reports: list[dict], job: Job = DONE, profile: SlurmProfile = PROFILE, **login) -> list[CheckResult]:
    return check_job(profile, SHAPE, "/s", job, LoginNode(VERSIONS, **login), reports)


def test_healthy_nodes_have_results_that_are_all_ok():
    found = checked(all_reports(), profile=replace(PROFILE, network_interface="ib0"))
    assert bad(found) == []
    text = " ".join(f.message for f in found)
    for word in (
        "2 nodes read and write study_dir=/s",
        "torch 2.9.0",
        "clocks of 2 nodes",
        "all-reduce of 4 ranks is right",
    ):
        assert word in text


GPU = {"count": 2, "faults": [], "built_for": "12.6", "cause": "", "ecc": {"0 (a)": 0}}


NODE_FAULTS = [
    ({"reply": {"sent": 1.0, "answered": None, "received": None}}, "error",
     ["do not arrive", "n2 wrote there and got no reply", "actimeo"]),
    ({"reply": {"sent": 100.0, "answered": 100.0, "received": 130.0}}, "warning", ["n2 had its reply after 30 s"]),
    ({"versions": {**VERSIONS, "code": "xyz"}}, "error", ["code is xyz on n2, abc on the login node"]),
    ({"versions": {**VERSIONS, "hpc_c2g": "0.0.9"}}, "error", ["hpc_c2g is 0.0.9 on n2", "profile.python"]),
    ({"versions": {**VERSIONS, "torch": "2.8.0"}}, "warning", ["torch is 2.8.0 on n2, 2.9.0 on"]),
    ({"versions": {**VERSIONS, "torch": "missing"}}, "error", ["torch is missing on n2"]),
    ({"seconds": {"import": 95.0}}, "warning", ["takes 95 s on n2", "container"]),
    ({"clock": [5.0, 0.1], "reply": {"sent": 105.0, "answered": 100.1, "received": 105.2}}, "warning", ["n2 is 5.0 s ahead", "leases"]),
    ({"clock": [-3.0, 0.1], "reply": {"sent": 97.0, "answered": 100.1, "received": 97.2}}, "warning", ["3.0 s behind"]),
    ({"scratch": "/x: No space left on device"}, "error", ["on n2: /x: No space", "profile.scratch"]),
    ({"gpus": {**GPU, "count": 1}}, "warning", ["sees 1 GPUs on n2, 0 were requested", "device=cpu"]),
    ({"sum": {"stage": "sum", "fault": "ranks 3 did not come, ...", "missing": [3], "seconds": 9.0}}, "error",
     ["ranks 3 did not come", "(n2)", "network_interface"]),
    ({"sum": {"stage": "meet", "fault": "cannot reach rank 0", "missing": [], "seconds": 9.0}}, "error",
     ["the all-reduce of 4 ranks failed: cannot reach rank 0", "ip link"]),
]  # fmt: skip


def test_each_fault_of_a_node_is_reported_once():
    def check(changes: dict, status: str, words: list[str]) -> None:
        the_only(checked(all_reports(**changes)), status, *words)

    assert offenders(NODE_FAULTS, check) == []


GPU_FAULTS = [
        (
        {**GPU, "count": 0, "built_for": None},
        "error",
        ["2 GPUs were requested on n1, n2", "0 (it was built without"],
    ),
    ({**GPU, "count": 0, "cause": "driver too old"}, "error", ["torch sees 0 (driver too old)", "--nv"]),
    ({**GPU, "count": 1}, "error", ["2 GPUs were requested on n1, n2, torch sees 1"]),
    ({**GPU, "count": 8}, "warning", ["torch sees 8 GPUs on n1, n2, 2 were requested", "exclusive=true"]),
    (
        {**GPU, "faults": ["cuda:1: 3 of 9"]},
        "error",
        ["a device fails on n1, n2: cuda:1: 3 of 9", "profile.exclude"],
    ),
]  # fmt: skip


def test_gpus_are_compared_with_the_profile():
    profile = replace(PROFILE, gpus_per_task=1)

    def check(gpus: dict, status: str, words: list[str]) -> None:
        the_only(checked([a_report(r, gpus=gpus) for r in range(4)], profile=profile), status, *words)

    assert offenders(GPU_FAULTS, check) == []
    found = checked([a_report(r, gpus=GPU) for r in range(4)], profile=profile)
    assert bad(found) == []
    assert any("2 GPUs on each of 2 nodes compute correctly" in f.message for f in found)


def test_uncorrected_memory_errors_name_the_gpu_and_its_node():
    gpus = {**GPU, "ecc": {"0 (a)": 0, "1 (b)": 7}}
    reports = [a_report(r, gpus=gpus if r == 2 else GPU) for r in range(4)]
    the_only(
        checked(reports, profile=replace(PROFILE, gpus_per_task=1)), "error", "GPU 1 (b) on n2 has 7", "exclude=n2"
    )


def test_a_missing_network_is_reported_without_its_consequences():
    hung = {"stage": "meet", "fault": "Unable to find address for: ib7", "missing": [], "seconds": 1.0}
    found = checked([a_report(r, sum=hung) for r in range(4)], profile=replace(PROFILE, network_interface="ib7"))
    the_only(found, "error", "network_interface=ib7 is not on n1, n2", "one of lo, ib0")


SILENT_RANKS = [
    ({"state": "FAILED", "reason": "JobLaunchFailure", "code": "0:53"}, 0,
     ["study_dir=/s cannot be written from n1", "profile.exclude=n1"]),
    ({"launch_errors": {2: "Slurmd could not connect IO", 3: "Slurmd could not connect IO"}}, 2,
     ["study_dir=/s cannot be written from n2", "profile.exclude=n2"]),
    ({"state": "FAILED", "code": "1:0", "errors": {0: "ModuleNotFoundError: No module named 'hpc_c2g'"}}, 1,
     ["rank 1, 2, 3 of 4", "the job ended as FAILED 1:0"]),
    ({"state": "FAILED", "code": "127:0", "errors": dict.fromkeys(range(4), "module: command not found")}, 0,
     ["rank 0, 1, 2, 3 of 4 on n1, n2", "module: command not found", "profile.modules"]),
    ({"state": "FAILED", "code": "2:0", "errors": dict.fromkeys(range(4), "No module named 'hpc_c2g'")}, 0,
     ["wrote no report: No module named 'hpc_c2g'", "profile.python"]),
    ({"state": "FAILED", "reason": "JobLaunchFailure", "code": "0:9"}, 0,
     ["rank 0, 1, 2, 3 of 4 on n1, n2 wrote no report", "FAILED 0:9"]),
    ({}, 3, ["rank 3 of 4 on n2 ended well", "does not arrive here", "share"]),
    ({"state": "FAILED", "code": "1:0", "shell_ok": False, "errors": {0: "No module named 'hpc_c2g'"}}, 4,
     ["the batch script could not run the epilog", "No module named 'hpc_c2g'", "profile.container"]),
]  # fmt: skip


def test_ranks_without_a_report_are_named_with_the_cause():
    def check(job: dict, count: int, words: list[str]) -> None:
        the_only(checked([a_report(r) for r in range(count)], replace(DONE, **job)), "error", *words)

    assert offenders(SILENT_RANKS, check) == []


def test_a_part_that_does_not_end_is_named():
    reports = all_reports(part="import")
    del reports[3]["sum"], reports[3]["gpus"]
    the_only(
        checked(reports, replace(DONE, state="CANCELLED")),
        "error",
        "rank 3 on n2",
        "'import'",
        "CANCELLED",
        "/s/doctor/x",
    )


def test_a_package_that_cannot_be_used_is_named():
    reports = all_reports(rank=None, import_error="ImportError: libcudart.so: not found")
    the_only(checked(reports), "error", "cannot be used on n2: ImportError: libcudart")


def test_a_skew_that_file_times_hide_is_bounded_by_messages():
    reply = {"sent": 105.0, "answered": 100.1, "received": 105.4}  # sent after it was answered: the node is ahead
    assert clock_skew((0.0, 0.0), (0.0, 0.0), reply) == pytest.approx(4.9)
    assert clock_skew((0.0, 0.0), (5.1, 0.0), reply) == pytest.approx(5.1)
    assert clock_skew((0.0, 0.0), (9.0, 0.0), reply) == pytest.approx(5.3)
    assert clock_skew((0.5, 0.0), (0.6, 0.0), {"sent": 1.0, "answered": None, "received": None}) == pytest.approx(0.1)


PENDING = [
    ("Priority", "unknown", "busy"),
    ("Resources", "unknown", "wait=SECONDS"),
    ("None", "unknown", "busy"),
    ("Nodes required for job are DOWN, DRAINED or reserved", "error", "sinfo -R"),
    ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "error", "sinfo -R"),
    ("QOSMaxJobsPerUserLimit", "error", "qos"),
    ("PartitionTimeLimit", "error", "time_minutes"),
    ("something new", "error", "scontrol show job"),
]


def test_a_pending_job_is_explained():
    def check(reason: str, status: str, word: str) -> None:
        the_only(checked([], Job("7", "PENDING", reason, waited=30.0)), status, "within 30 s", "cancelled", word)

    assert offenders(PENDING, check) == []


# --- the job --------------------------------------------------------------------------------------------------------------


def test_a_job_that_does_not_start_is_cancelled_and_leaves_nothing(slurm, tmp_path, monkeypatch):
    slurm.answers(job="JobId=7 JobState=PENDING Reason=Priority NodeList= ExitCode=0:0\n")
    monkeypatch.setattr(node_job, "through_submitit", lambda *_: "7")
    study = tmp_path / "study"
    found = node_job.check_nodes_by_job(PROFILE, Shape(), study, wait=0.5)
    the_only(found, "unknown", "within 0 s", "Priority")
    assert slurm.calls("scancel") == ["--quiet 7"]
    assert not study.exists()


def test_a_job_is_cancelled_also_when_the_doctor_is_interrupted(slurm, tmp_path, monkeypatch):
    slurm.answers(job="JobId=7 JobState=RUNNING Reason=None\n")
    monkeypatch.setattr(node_job, "through_submitit", lambda *_: "7")

    def interrupt(_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        node_job.check_nodes_by_job(PROFILE, Shape(), tmp_path, wait=5, log_fn=interrupt)
    assert slurm.calls("scancel") == ["--quiet 7"]


def test_a_job_asks_for_what_a_run_asks_for_but_is_short_and_not_put_back(slurm, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(node_job, "through_submitit", lambda *a: seen.append(a) or "7")
    profile = replace(PROFILE, time_minutes=700, signal_seconds=600, setup=["true"], extra={"nice": 3})
    node_job.check_nodes_by_job(profile, Shape(2, 2), tmp_path, wait=0.1)
    ((_, parameters, folder, (work,)),) = seen
    assert (parameters["nodes"], parameters["ntasks_per_node"], parameters["cpus_per_task"]) == (2, 2, 2)
    assert (parameters["mem"], parameters["partition"], parameters["time"]) == ("8192M", "main", 10)
    assert parameters["additional_parameters"] == {"no-requeue": True, "signal": "USR2@30", "nice": 3}
    assert "true" in parameters["setup"]
    assert parameters["teardown"][1] == f'{sys.executable} -m hpc_c2g.preflight.node_probe {folder} "$code"'
    assert work == node_probe.NodeProbe(str(folder))


def test_a_refusal_of_sbatch_leaves_nothing_behind(slurm, tmp_path):
    slurm.refuses("sbatch: error: Invalid qos specification")
    with pytest.raises(UserError, match="Invalid qos"):
        node_job.check_nodes_by_job(PROFILE, Shape(), tmp_path / "study", wait=1)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("breaks", [False, True])
def test_a_job_from_its_submission_to_its_results(slurm, tmp_path, monkeypatch, breaks):
    slurm.has(
        "scontrol",
        f'case "$*" in *hostnames*) echo n1;; *) for f in {tmp_path}/doctor/*/epilog.json; do [ -e $f ] && S=COMPLETED; done;'
        " echo JobId=7 JobState=${S:-RUNNING} Reason=None NodeList=n1 BatchHost=n1 ExitCode=0:0;; esac",
    )
    children = []

    def submit(profile, parameters, folder, attempts) -> str:
        command = f"{sys.executable} -m hpc_c2g.preflight.node_probe {folder}"
        fault = f"echo 'ImportError: numpy is broken' > {folder}/7_0_log.err"
        children.append(subprocess.Popen(["bash", "-c", f"{fault if breaks else command}; {command} 0"]))
        return "7"

    monkeypatch.setattr(node_job, "through_submitit", submit)
    monkeypatch.setattr(node_job, "REPLY_TIMEOUT_S", 2.0)
    lines: list[str] = []
    found = node_job.check_nodes_by_job(PROFILE, Shape(), tmp_path, wait=100, log_fn=lines.append)
    children[0].wait(60)
    assert any("job 7: running" in line for line in lines)
    if breaks:
        the_only(found, "error", "rank 0 of 1 on n1 wrote no report: ImportError: numpy is broken")
        assert list(tmp_path.glob("doctor/*/7_0_log.err"))  # kept to be read
    else:
        assert [f for f in bad(found) if "GPUs" not in f.message] == []
        assert not (tmp_path / "doctor").exists()


# --- the command ----------------------------------------------------------------------------------------------------------


def c2g(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(cluster.__file__).parents[2])


def test_the_command_prints_every_result_and_exits_with_1_on_an_error(slurm, tmp_path):
    good = c2g("cluster=local_slurm", f"study_dir={tmp_path}", "--json")
    assert good.returncode == 0, good.stderr
    answer = json.loads(good.stdout)
    assert answer["errors"] == 0
    assert {f["status"] for f in answer["findings"]} <= {"ok", "warning", "unknown"}
    wrong = c2g(str(tmp_path), "cluster=local_slurm", "profile.partition=nope")
    assert wrong.returncode == 1
    (line,) = (line for line in wrong.stdout.splitlines() if line.startswith("error"))
    assert "partition=nope does not exist -- " in line


MISTAKES = [
    (["profile.partition=x"], "cluster=local has no profile"),
    (["--job"], "cluster=local sends no jobs -- add cluster=PROFILE"),
    (["cluster=lokal_slurm"], "did you mean local_slurm"),
    (["cluster=local_slurm", "nodes=0"], "nodes=0"),
    (["wait=0"], "wait=0"),
    (["study_dri=x"], "did you mean study_dir"),
]


def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capsys):
    def check(arguments: list[str], text: str) -> None:
        monkeypatch.setattr(sys, "argv", ["c2g doctor", *arguments])
        with pytest.raises(SystemExit) as end:
            launch.doctor.main()
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("c2g doctor: error: ")
        assert text in line

    assert offenders(MISTAKES, check) == []


def test_the_doctor_imports_no_torch():
    code = "import sys, launch.doctor, hpc_c2g.preflight.node_job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
