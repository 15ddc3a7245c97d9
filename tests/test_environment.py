"""Laws of the launch environment, from dictionaries: torchrun before srun before a single process, nothing half set."""

from __future__ import annotations

import os

import pytest
import torch

from hpc_c2g.distributed.environment import PORTS, LaunchEnvironment, deepspeed_variables, detect, first_host
from hpc_c2g.errors import UserError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}


def test_nothing_set_is_a_single_process() -> None:
    assert detect({}) == LaunchEnvironment()
    assert detect({"PATH": "/bin", "MASTER_PORT": "1"}) == LaunchEnvironment()


def test_torchrun_is_read_whole() -> None:
    assert detect(TORCHRUN) == LaunchEnvironment("torchrun", 3, 4, 1, 2, "node1", 29500)


def test_srun_is_read_whole() -> None:
    launch = detect(SRUN)
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_rank) == ("srun", 5, 6, 1)
    assert (launch.local_world_size, launch.master_address) == (2, "gpu03")
    assert launch.master_port in PORTS


def test_torchrun_goes_before_srun() -> None:
    assert detect(SRUN | TORCHRUN).launcher == "torchrun"


def test_a_batch_script_or_a_step_of_one_task_is_a_single_process() -> None:
    assert detect({k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}) == LaunchEnvironment()
    assert detect(SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == LaunchEnvironment()


def test_every_task_of_a_step_has_the_same_port_and_another_step_another() -> None:
    ports = {
        detect(SRUN | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r % 2), "SLURM_NODEID": str(r // 2)}).master_port
        for r in range(6)
    }
    assert len(ports) == 1
    assert detect(SRUN | {"SLURM_STEP_ID": "1"}).master_port not in ports
    assert detect(SRUN | {"SLURM_JOB_ID": "1235"}).master_port not in ports


def test_half_a_torchrun_is_refused_naming_what_is_missing(subtests: pytest.Subtests) -> None:
    for missing in ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]:
        with subtests.test(missing), pytest.raises(UserError, match=f"{missing} missing"):
            detect({k: v for k, v in TORCHRUN.items() if k != missing})


def test_half_an_srun_is_refused_naming_what_is_missing(subtests: pytest.Subtests) -> None:
    for missing in ["SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"]:
        with subtests.test(missing), pytest.raises(UserError, match=f"{missing} missing"):
            detect({k: v for k, v in SRUN.items() if k != missing})


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"RANK": "-1"}, {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "5"}])
def test_contradictions_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(UserError, match="contradict each other"):
        detect(TORCHRUN | change)


def test_what_is_no_number_is_refused_naming_it() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE='four' is no number"):
        detect(TORCHRUN | {"WORLD_SIZE": "four"})


def test_the_first_host_of_a_node_list(subtests: pytest.Subtests) -> None:
    for nodes, first in [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("r1n[001-004].cluster", "r1n001.cluster"),
        ("n-1-[12-13],n-2-[1]", "n-1-12"),
    ]:
        with subtests.test(nodes):
            assert first_host(nodes) == first


def test_deepspeed_s_variables_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "kept")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with deepspeed_variables(LaunchEnvironment("test", 1, 2, 1, 2), torch.device("cpu")):
        assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("1", "1")
    assert os.environ["RANK"] == "kept"
    assert "LOCAL_RANK" not in os.environ
