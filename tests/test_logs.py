"""Laws of the log: one line per message, with time, rank, host and step; rank 0 on stderr, every rank in a file where asked."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from rich.console import Console
from rich.progress import Progress

from benchmarks.common import random_classifier
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.logs import LEVELS, run_logging
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import CheckpointConfig, LogConfig, TrainConfig
from hpc_c2g.training.loop import train

LOG = logging.getLogger("hpc_c2g.test")
HOST = socket.gethostname()


def file_of(run_dir: Path, rank: int) -> list[str]:
    return (run_dir / "logs" / f"rank_{rank:05d}.log").read_text().splitlines()


def messages(lines: list[str]) -> list[str]:
    return [line.partition(": ")[2] for line in lines]


def test_a_line_has_time_level_rank_host_step_and_module(capfd):
    with run_logging("info", 0):
        LOG.info("begun")
        LOG.warning("slow", extra={"step": 20})
    out, err = capfd.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} INFO \[rank 0 {HOST}\] hpc_c2g.test: begun", first)
    assert second.endswith(f" WARNING [rank 0 {HOST} step 20] hpc_c2g.test: slow")


def test_the_level_is_the_lowest_that_is_logged(capfd):
    for lowest, level in enumerate(LEVELS):
        with run_logging(level, 0):
            for name in LEVELS:
                LOG.log(getattr(logging, name.upper()), name)
        assert messages(capfd.readouterr().err.splitlines()) == list(LEVELS[lowest:])
    with pytest.raises(UserError, match=r"log\.level=loud is not possible -- choose debug, info"):
        LogConfig(level="loud")


def test_other_ranks_print_nothing_and_write_their_own_file_where_asked(tmp_path, capfd):
    for rank in (0, 3):
        with run_logging("info", rank, tmp_path):
            LOG.error("rank %d", rank)
    assert messages(capfd.readouterr().err.splitlines()) == ["rank 0"]
    for rank in (0, 3):
        (line,) = file_of(tmp_path, rank)
        assert f"[rank {rank} {HOST}] hpc_c2g.test: rank {rank}" in line
    with run_logging("info", 3, tmp_path):
        LOG.error("resumed")
    assert messages(file_of(tmp_path, 3)) == ["rank 3", "resumed"]


def test_a_handler_of_the_root_logger_does_not_print_a_second_time(capfd):
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        with run_logging("info", 0):
            LOG.info("once")
        with run_logging("info", 0):  # a verb within a verb, as the demo has it
            LOG.info("once more")
    finally:
        logging.getLogger().removeHandler(root)
    assert messages(capfd.readouterr().err.splitlines()) == ["once", "once more"]


def test_a_decorated_verb_logs_in_each_of_its_calls(capfd):
    @run_logging("warning", rank=0)
    def verb(text: str) -> None:
        LOG.info("hidden")
        LOG.warning(text)

    verb("first")
    verb("second")
    assert messages(capfd.readouterr().err.splitlines()) == ["first", "second"]


def test_the_logger_is_left_as_it_was_found():
    logger = logging.getLogger("hpc_c2g")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with contextlib.suppress(KeyError), run_logging("debug", 0):
        assert (logger.level, logger.propagate) == (logging.DEBUG, False)
        raise KeyError
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_importing_the_package_installs_no_handler():
    code = (
        "import logging, hpc_c2g.training.loop, hpc_c2g.studies.attempt, hpc_c2g.logs;"
        "loggers = [logging.getLogger(n) for n in logging.root.manager.loggerDict if n.startswith('hpc_c2g')];"
        "assert loggers and not [logger for logger in loggers if logger.handlers or logger.level]"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_message_stands_whole_above_the_progress_bar():
    screen = io.StringIO()
    bar = Progress(console=Console(file=screen, force_terminal=True, width=200))
    with run_logging("info", 0), bar:
        bar.add_task("train", total=10)
        LOG.info("a message")
        bar.refresh()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    (line,) = (line for line in plain.splitlines() if "a message" in line)
    assert line.rstrip().endswith("hpc_c2g.test: a message")
    assert re.match(r"\d{4}-", line)
    assert plain.rindex("train") > plain.index("a message")


def test_a_log_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logs").touch()
    with pytest.raises(UserError, match=r"rank_00000\.log"), run_logging("info", 0, tmp_path):
        pass


def settings(classifier: Path, run_dir: Path, **changes) -> TrainConfig:
    values = {"log": LogConfig(progress=False), "checkpoint": CheckpointConfig(every=2), "steps": 4}
    return TrainConfig(str(classifier), str(run_dir), global_batch=16, device="cpu", **{**values, **changes})


def a_run(world: World, classifier: Path, run_dir: Path) -> str:
    """What the rank prints on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as console, run_logging("info", world.rank, run_dir):
        train(settings(classifier, run_dir, alpha=AlphaConfig(init=0.0)), world)
    return console.getvalue()


def test_two_ranks_make_one_line_on_the_console_and_a_file_each(tmp_path):
    classifier, run_dir = random_classifier(tmp_path / "classifier", seed=0), tmp_path / "run"
    (_, first), (_, second) = run_ranks(2, tmp_path / "meeting", a_run, classifier, run_dir)
    assert second == ""
    lines = first.splitlines()
    assert len([line for line in lines if "starting: 4 steps on 2 processes (test, gloo)" in line]) == 1
    assert file_of(run_dir, 0) == lines
    (start, end) = file_of(run_dir, 1)  # rank 0 alone writes checkpoints
    assert f"[rank 1 {HOST}]" in start
    assert "starting: 4 steps on 2 processes (test, gloo)" in start
    assert f"[rank 1 {HOST} step 4]" in end


def test_a_run_logs_its_start_pilot_checkpoints_resumption_and_end(tmp_path, caplog):
    caplog.set_level("INFO", "hpc_c2g")
    classifier = random_classifier(tmp_path / "classifier", seed=0)

    def logged(steps: int) -> list[str]:
        caplog.clear()
        train(settings(classifier, tmp_path / "run", steps=steps, alpha=AlphaConfig(pilot_steps=2)))
        return [re.sub(r"\d+\.\d+ s|\d+ bytes", "#", record.getMessage()) for record in caplog.records]

    start, pilot, advice, *checkpoints, end = logged(4)
    assert start.startswith("starting: 4 steps on 1 process (single, no process group), device cpu, dtype float32")
    assert "micro-batch the whole share, G #" in start
    assert re.fullmatch(r"pilot: alpha starts at -?\d+\.\d{4} \(2 steps, #\)", pilot)
    assert advice.startswith("global_batch: 16 is no multiple of classes x codes")
    folders = [tmp_path / "run" / "checkpoints" / f"step_{step:08d}" for step in (2, 4)]
    assert checkpoints == [f"checkpoint written: {folder}, # in #" for folder in folders]
    assert end == "finished: 4 steps in #"
    shutil.rmtree(folders[1])
    start, resumed, *checkpoints, end = logged(4)
    assert resumed == f"resuming after step 2 from {folders[0]}"
    assert checkpoints == [f"checkpoint written: {folders[1]}, # in #"]
    assert end == "finished: 2 steps in #"
