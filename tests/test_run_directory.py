"""Laws of a run directory: one process at a time, one configuration, and a message that names what is in the way."""

from __future__ import annotations

import errno
import json
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from hpc_c2g.errors import UserError
from hpc_c2g.generators.config import ConvGeneratorConfig, FreeImagesConfig, MLPGeneratorConfig
from hpc_c2g.lease import Lease
from hpc_c2g.monitoring.config import AlarmConfig, LogConfig
from hpc_c2g.monitoring.profiler import ProfilerConfig
from hpc_c2g.training.config.objective import AlphaConfig, PriorConfig
from hpc_c2g.training.config.train import CheckpointConfig, OptimizerConfig, TrainConfig, config_from
from hpc_c2g.training.run_directory import RunDirectory, plain, read_config

HOLDER = """
import sys, time
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.run_directory import RunDirectory
with RunDirectory(TrainConfig(classifier="c", run_dir=sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(classifier="c", run_dir=str(tmp_path / "some" / "run"))


def enter(config: TrainConfig) -> None:
    """A run that gets as far as a checkpoint, which binds the folder to its settings."""
    with RunDirectory(config) as run:
        (run.path / "checkpoints" / "step_00000001").mkdir(parents=True, exist_ok=True)


def test_while_a_process_holds_it_no_other_enters_and_a_killed_one_holds_nothing(config):
    enter(config)  # the message must not name this earlier one
    command = [sys.executable, "-c", HOLDER, config.run_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError) as caught:
                enter(config)
        finally:
            holder.send_signal(signal.SIGKILL)
    in_use = f"run_dir={config.run_dir} is in use by process {holder.pid} on {socket.gethostname()}"
    assert caught.value.problem == in_use
    enter(config)


def test_the_second_entry_of_one_process_is_refused_too_and_leaving_frees_it(config):
    with RunDirectory(config), pytest.raises(UserError, match="is in use"):
        enter(config)
    enter(config)


@pytest.mark.parametrize(
    "generator",
    [MLPGeneratorConfig(widths=[3, 5]), ConvGeneratorConfig(channels=16), FreeImagesConfig(start=0.5)],
    ids=lambda g: g.name,
)
def test_the_file_holds_the_whole_configuration(config, generator):
    config = replace(config, generator=generator, optimizer=OptimizerConfig(lr=0.5), deepspeed={"a": {"b": [1, 2]}})
    with RunDirectory(config) as run:
        again = config_from(read_config(run.path / "config.yaml"))
    assert type(again.generator) is type(generator)
    assert plain(again) == plain(config)
    enter(config)


def test_other_settings_are_refused_by_name_with_both_values(subtests, config):
    for change, message in [
        ({"steps": 7}, "steps=5 there, 7 now"),
        ({"seed": 3}, "seed=0 there, 3 now"),
        ({"dtype": "bfloat16"}, "dtype=float32 there, bfloat16 now"),
        ({"deterministic": True}, "deterministic=False there, True now"),
        ({"optimizer": OptimizerConfig(lr=0.5)}, "optimizer.lr=0.001 there, 0.5 now"),
        ({"prior": PriorConfig(mean=0.5)}, "prior.mean=0.0 there, 0.5 now"),
        ({"alpha": AlphaConfig(init=-2.0)}, "alpha.init=None there, -2.0 now"),
        ({"generator": ConvGeneratorConfig()}, "generator.name=mlp there, conv now"),
        ({"generator": MLPGeneratorConfig(widths=[9])}, "generator.widths=[256] there, [9] now"),
        ({"deepspeed": {"x": 1}}, "deepspeed.x=None there, 1 now"),
    ]:
        with subtests.test(message):
            config = replace(config, steps=5)
            enter(config)
            with pytest.raises(UserError) as caught:
                enter(replace(config, **change))
            assert message in caught.value.problem
            assert config.run_dir in caught.value.problem
            enter(config)  # the refused one left neither its lock nor its settings


def test_a_run_from_before_a_setting_existed_has_its_default(config):
    enter(config)
    file = RunDirectory(config).path / "config.yaml"
    old = OmegaConf.load(file)
    del old.matmul_precision, old.generator.canvas
    OmegaConf.save(old, file)
    enter(config)
    with pytest.raises(UserError, match=r"generator\.canvas=False there, True now"):
        enter(replace(config, generator=replace(config.generator, canvas=True)))


def test_what_only_another_version_knows_is_told_as_a_difference_or_does_not_matter(config):
    enter(config)
    file = RunDirectory(config).path / "config.yaml"
    old = OmegaConf.load(file)
    old.log.future, old.micro_batch = 3, 10**6
    OmegaConf.save(old, file)
    enter(config)
    old.future = 1
    OmegaConf.save(old, file)
    with pytest.raises(UserError, match=r"run_dir=.* holds a run with other settings: future=1 there, None now"):
        enter(config)


def test_a_start_that_left_no_checkpoint_binds_nothing(config):
    with RunDirectory(config):
        pass
    enter(replace(config, steps=7))
    assert read_config(RunDirectory(config).path / "config.yaml")["steps"] == 7


def test_settings_that_do_not_change_the_result_may_change(subtests, config):
    for change in [
        {"log": LogConfig(every=3, images_every=7, progress=False, level="error", all_ranks=True)},
        {"profiler": ProfilerConfig(steps=[2, 4], ranks=[0, 1])},
        {"checkpoint": CheckpointConfig(every=3, keep=7)},
        {"device": "cpu"},
        {"micro_batch": 3},
        {"classifier": "moved"},  # its weights are compared with the checkpoint's
    ]:
        with subtests.test(next(iter(change))):
            enter(config)
            enter(replace(config, **change))


def test_the_output_of_a_run_may_change_where_its_result_depends_on_log_every(config):
    slowed = replace(config, alarms=AlarmConfig("lower_lr"))
    enter(slowed)
    enter(replace(slowed, log=LogConfig(progress=False, level="debug", all_ranks=True)))
    with pytest.raises(UserError, match=r"log\.every=20 there, 3 now"):
        enter(replace(slowed, log=LogConfig(every=3)))


def test_the_folder_may_be_moved(config, tmp_path):
    enter(config)
    (tmp_path / "some").rename(tmp_path / "other")
    enter(replace(config, run_dir=str(tmp_path / "other" / "run")))


@pytest.mark.parametrize(
    "content", [b"steps: [", b"\xff\xfe\x00\x01", b"[1, 2]", b"a: ${oops", b"key: : value"], ids=repr
)
def test_a_damaged_settings_file_is_named(config, content):
    enter(config)
    file = RunDirectory(config).path / "config.yaml"
    file.write_bytes(content)
    for action in (lambda: enter(config), lambda: read_config(file)):
        with pytest.raises(UserError) as caught:
            action()
        assert f"{file} is damaged" in caught.value.problem
        assert "\n" not in str(caught.value)


def test_settings_that_this_version_does_not_know_are_named():
    with pytest.raises(UserError, match="color"):
        config_from({"color": "red"})
    with pytest.raises(UserError, match=r"generator\.name='gan' is unknown"):
        config_from({"generator": {"name": "gan"}})


def test_a_run_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is no run: config\.yaml cannot be read"):
        read_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("run_dir", ["file", "file/below"])
def test_a_path_that_cannot_be_a_folder_is_named(config, tmp_path, run_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write") as caught:
        enter(replace(config, run_dir=str(tmp_path / run_dir)))
    assert str(tmp_path / run_dir) in caught.value.problem


def test_a_run_that_a_study_holds_on_another_host_is_refused_and_its_own_process_is_not(tmp_path):
    config = TrainConfig(classifier="c", run_dir=str(tmp_path / "run"))
    with Lease(tmp_path / "run", "job 7_1 on n2"):
        with RunDirectory(config):
            pass
        file = max((tmp_path / "run" / "leases").glob("0*"))
        told = json.loads(file.read_text())
        file.write_text(json.dumps({**told, "host": "n2", "boot": "another"}))
        with pytest.raises(UserError, match="is in use by job 7_1 on n2"), RunDirectory(config):
            pass
        file.write_text(json.dumps(told))


def test_a_file_system_without_locks_is_no_run_in_use(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunDirectory(TrainConfig(classifier="c", run_dir=str(tmp_path / "run"))):
        pass


def test_a_setting_that_this_version_does_not_have_is_named(config):
    enter(config)
    file = RunDirectory(config).path / "config.yaml"
    old = OmegaConf.load(file)
    old.prior.repulsion = 0.0
    old.latents = {"scheme": "sobol"}
    OmegaConf.save(old, file)
    with pytest.raises(UserError, match=r"does not have: prior\.repulsion, latents ") as caught:
        read_config(file)
    assert "another run_dir" in caught.value.hint
