"""Laws of several ranks: the same run as one process, to rounding, and in deterministic mode to the last bit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor

from hpc_c2g.classifiers.bundle import Bundle, build_model, save_bundle
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.distributed import world as world_module
from hpc_c2g.distributed.environment import LaunchEnvironment
from hpc_c2g.distributed.reduction import RunningSum, TreeSum, tree_sum
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import CheckpointConfig, DistributedConfig, TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.preemption import Preempted
from hpc_c2g.training.results import load_run


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A short run on a random classifier: equality needs no quality."""
    folder = tmp_path_factory.mktemp("ranks") / "classifier"
    architecture = {"target": "mlp", "input_shape": [1, 5, 5], "classes": 4, "width": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(architecture).double()
    for parameter in model.parameters():
        parameter.data *= 3
    save_bundle(Bundle(model, architecture, list("abcd"), (1, 5, 5), Normalization.constant((1, 5, 5), 0.5)), folder)
    return TrainConfig(
        classifier=str(folder),
        steps=12,
        deterministic_shards=4,  # one each on 4 ranks
        global_batch=63,  # shared unevenly by 2 and by 4
        device="cpu",
        alpha=AlphaConfig(pilot_steps=5),
        log=LogConfig(every=1, progress=False),
        checkpoint=CheckpointConfig(every=5),
    )


def trained(world: World | None, *configs: TrainConfig) -> None:
    torch.set_num_threads(1)
    for config in configs:
        train(config, world)


def curve(run_dir: Path) -> Tensor:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line[k] for k in ("loss", "stationarity", "alpha", "rho")] for line in lines])


def weights(run_dir: Path) -> Tensor:
    return torch.cat([p.reshape(-1) for p in load_run(run_dir).generator.module.parameters()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, settings: TrainConfig) -> Path:
    """``plain1``, ``plain2``, ``micro2``, ``micro4``: one process and several; ``bits1``, ``bits2``, ``bits4``: deterministic."""
    folder = tmp_path_factory.mktemp("runs")

    def config(name: str, **changes: object) -> TrainConfig:
        return replace(settings, run_dir=str(folder / name), **changes)

    trained(None, config("plain1"), config("bits1", deterministic=True))
    on_two = [config("plain2"), config("micro2", micro_batch=5), config("bits2", deterministic=True)]
    on_four = [config("micro4", micro_batch=16), config("bits4", deterministic=True)]
    for count, configs in ((2, on_two), (4, on_four)):
        results = run_ranks(count, folder / "meetings", trained, *configs)
        assert [kind for kind, _ in results] == ["value"] * count, results
    return folder


def test_ranks_and_micro_batches_give_the_run_of_one_process(subtests: pytest.Subtests, runs: Path) -> None:
    for name in ["plain2", "micro2", "micro4"]:
        with subtests.test(name):
            one, several = runs / "plain1", runs / name
            torch.testing.assert_close(curve(several)[0], curve(one)[0], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(curve(several), curve(one), rtol=1e-4, atol=1e-6)
            assert float((weights(several) - weights(one)).norm() / weights(one).norm()) < 1e-4


def test_deterministic_runs_are_the_same_bits_on_any_number_of_ranks(subtests: pytest.Subtests, runs: Path) -> None:
    for name in ["bits2", "bits4"]:
        with subtests.test(name):
            assert torch.equal(curve(runs / name), curve(runs / "bits1"))
            assert torch.equal(weights(runs / name), weights(runs / "bits1"))


def test_a_run_with_bfloat16_communication_resumes_bitwise(tmp_path: Path, settings: TrainConfig, runs: Path) -> None:
    short = replace(settings, distributed=DistributedConfig(comm_dtype="bfloat16"), run_dir=str(tmp_path / "whole"))
    again = replace(short, run_dir=str(tmp_path / "again"))
    results = run_ranks(2, tmp_path / "meetings", trained_and_cut, short, again)
    assert [kind for kind, _ in results] == ["value"] * 2, results
    assert torch.equal(curve(tmp_path / "again"), curve(tmp_path / "whole"))
    assert torch.equal(weights(tmp_path / "again"), weights(tmp_path / "whole"))
    exact = curve(runs / "plain1")
    assert not torch.equal(curve(tmp_path / "whole"), exact)
    torch.testing.assert_close(curve(tmp_path / "whole"), exact, rtol=0.02, atol=1e-3)


def trained_and_cut(world: World, whole: TrainConfig, again: TrainConfig) -> None:
    """Train, take the last checkpoint away from a copy, and let that go on."""
    trained(world, whole)

    def cut() -> None:
        shutil.copytree(whole.run_dir, again.run_dir)
        shutil.rmtree(max((Path(again.run_dir) / "checkpoints").iterdir()))

    world.broadcast_from_rank0(cut)
    trained(world, again)


def stopped_by_last_rank(world: World, config: TrainConfig) -> str:
    torch.set_num_threads(1)
    if world.rank == world.size - 1:
        original = World.any_rank

        def late(self: World, flag: str | None) -> str | None:
            late.calls += 1
            if late.calls == 12:  # five of them in the pilot
                os.kill(os.getpid(), signal.SIGUSR2)
                flag = "SIGUSR2"  # the handler has set it by now, but after the loop read it
            return original(self, flag)

        late.calls = 0
        World.any_rank = late
    try:
        train(config, world)
    except Preempted as stop:
        return f"{stop.signal_name} {stop.step}"
    return "ran to its end"


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_one_process_resumes(
    tmp_path: Path, settings: TrainConfig, runs: Path
) -> None:
    config = replace(settings, run_dir=str(tmp_path / "run"), deterministic=True)
    assert run_ranks(2, tmp_path / "meetings", stopped_by_last_rank, config) == [("value", "SIGUSR2 7")] * 2
    trained(None, config)
    assert torch.equal(curve(tmp_path / "run"), curve(runs / "bits1"))
    assert torch.equal(weights(tmp_path / "run"), weights(runs / "bits1"))


def refusals(world: World, *configs: TrainConfig) -> list[str]:
    said = []
    for config in configs:
        try:
            train(config, world)
        except UserError as error:
            said.append(str(error))
    return said


def test_what_is_refused_is_refused_on_every_rank_and_nothing_is_trained(
    tmp_path: Path, settings: TrainConfig, runs: Path
) -> None:
    uneven = replace(settings, deterministic=True, deterministic_shards=1, run_dir=str(tmp_path / "uneven"))
    other = replace(settings, seed=5, run_dir=str(runs / "plain1"))
    for kind, said in run_ranks(2, tmp_path / "meetings", refusals, uneven, other):
        assert kind == "value", said
        assert "deterministic_shards=1 cannot be shared by 2 processes" in said[0]
        assert "seed=0 there, 5 now" in said[1]
    assert not (tmp_path / "uneven" / "checkpoints").exists()


def dies_at_a_step(world: World, config: TrainConfig) -> str:
    world_module.ROLL_CALL_SECONDS = 1.0  # the survivor waits that long for the dead to answer
    if world.rank == 1:
        original = World.any_rank

        def deadly(self: World, flag: str | None) -> str | None:
            deadly.calls += 1
            if deadly.calls == 9:  # five of them in the pilot
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, flag)

        deadly.calls = 0
        World.any_rank = deadly
    began = time.monotonic()
    try:
        train(config, world)
    except UserError as error:
        return f"{time.monotonic() - began < 30} {error}"
    return "trained to its end"


def test_a_killed_rank_ends_the_others_soon_and_is_named(tmp_path: Path, settings: TrainConfig) -> None:
    config = replace(settings, run_dir=str(tmp_path / "run"))
    survivor, dead = run_ranks(2, tmp_path / "meetings", dies_at_a_step, config)
    assert dead == ("no answer", -signal.SIGKILL)
    assert survivor[1].startswith("True rank 1 of 2 is gone"), survivor


def sums(world: World, parts: Tensor) -> list[Tensor]:
    results = []
    for summation in (RunningSum(world), TreeSum(world)):
        for part in parts.chunk(world.size)[world.rank]:
            summation.add({"first": part[:3], "rest": part[3:]})
        results.append(torch.cat(list(summation.total().values())).tolist())
    return results


def test_sums_over_ranks_are_the_sum_and_the_tree_s_are_the_same_bits(tmp_path: Path) -> None:
    parts = torch.randn(8, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind, (running, tree) in run_ranks(2, tmp_path, sums, parts):
        assert kind == "value"
        torch.testing.assert_close(torch.tensor(running, dtype=torch.float64), parts.sum(0), rtol=1e-12, atol=1e-12)
        assert tree == tree_sum(parts).tolist()


def test_the_tree_adds_neighbors() -> None:
    layers = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    assert tree_sum(layers).tolist() == [0.0]  # the ones are lost beside 1e8; another order would keep them


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    alone = LaunchEnvironment("test", 0, 3, 0, 3, f"file://{tmp_path / 'meeting'}")
    with pytest.raises(UserError, match="rank 1, 2 of 3 did not join within 1 s"):
        World.start("cpu", deterministic=False, launch=alone, seconds=1)


LAST_WORDS = """
import atexit, os, sys
from pathlib import Path

def name(task):
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it ended since it was listed
        return ""

def threads():
    return list(filter(None, map(name, Path("/proc/self/task").iterdir())))

atexit.register(lambda: print("left:", *threads(), flush=True))  # the first to be registered is the last to run
from hpc_c2g.training.config.train import config_from
from hpc_c2g.training.loop import train
import deepspeed, torch._dynamo  # once for all ranks, which are forked before any thread is started

classifier, folder = sys.argv[1:]
ranks = {}
for mode in ("deterministic", "plain"):
    for rank in ("0", "1"):
        pid = os.fork()
        if not pid:
            break
        ranks[mode, rank] = pid
    if not pid:
        break
else:
    for (mode, rank), pid in ranks.items():
        print(mode, rank, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    sys.exit()
for stream, suffix in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{folder}/{mode}-{rank}.{suffix}", os.O_CREAT | os.O_WRONLY), stream)
place = {"MASTER_ADDR": f"file://{folder}/meeting-{mode}", "MASTER_PORT": "0"}
os.environ.update(place, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
settings = {"steps": 2, "global_batch": 63, "device": "cpu", "alpha": {"pilot_steps": 2}, "log": {"progress": False}}
where = {"classifier": classifier, "run_dir": f"{folder}/{mode}", "deterministic": mode == "deterministic"}
train(config_from(where | settings))
print("trained:", *threads())
"""


def test_no_thread_of_a_process_group_outlives_the_interpreter(settings: TrainConfig, tmp_path: Path) -> None:
    """One that did ended a finished run by SIGABRT now and then: it held a tensor whose owner, the interpreter, was gone."""
    command = [sys.executable, "-c", LAST_WORDS, settings.classifier, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, complaint = parent.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)  # ranks that hang outlive their parent
    assert parent.returncode == 0, complaint
    ranks = [tuple(line.split()) for line in said.splitlines() if not line.startswith("left:")]
    assert len(ranks) == 4, said
    for mode, rank, code in ranks:
        log = tmp_path / f"{mode}-{rank}"
        assert code == "0", log.with_suffix(".err").read_text()
        lines = log.with_suffix(".out").read_text().splitlines()
        during, after = (next(line for line in lines if line.startswith(word)) for word in ("trained:", "left:"))
        assert "gloo" in during  # else the test proves nothing
        assert "gloo" not in after
