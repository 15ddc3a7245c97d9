"""Laws of the command line: a mistake is one line with exit code 2, a signal has a code of its own, help shows all fields."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.studies import sweep
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save

from hpc_c2g.classifiers.bundle import META, WEIGHTS
from hpc_c2g.data.config import DataConfig
from hpc_c2g.errors import UserError
from hpc_c2g.fitting import progress
from hpc_c2g.fitting.config import ClassifierConfig, MarginFitConfig
from hpc_c2g.fitting.make import RECORD, make_classifier
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.run_directory import RunDirectory
from hpc_c2g.training.step.train_step import TrainStep
from launch.__main__ import VERBS, main
from launch._compose.help import described

SMALL = ["data.classes=[0,1]", "data.train_size=20", "fit.target_margin=3", "model.width=8"]
FEW = ["steps=3", "global_batch=8", "alpha.init=-1", "log.progress=false", "log.every=1", "device=cpu"]


@pytest.fixture
def c2g(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; gives its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["c2g", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A classifier of two digits with a short run, and a copy without record with a run of its own."""
    folder = tmp_path_factory.mktemp("places")
    found = {name: folder / name for name in ("classifier", "run", "unrecorded", "unrecorded_run", "empty")}
    data, fit = DataConfig(train_size=20, classes=[0, 1]), MarginFitConfig(target_margin=3.0)
    model = {"_target_": "mlp", "width": 8}
    make_classifier(ClassifierConfig(out=str(found["classifier"]), data=data, model=model, fit=fit))
    shutil.copytree(found["classifier"], found["unrecorded"])
    (found["unrecorded"] / RECORD).unlink()
    found["empty"].mkdir()
    settings = {"steps": 2, "global_batch": 8, "alpha": AlphaConfig(init=-1.0), "log": LogConfig(progress=False)}
    train(TrainConfig(str(found["classifier"]), str(found["run"]), **settings))
    train(TrainConfig(str(found["unrecorded"]), str(found["unrecorded_run"]), **settings))
    return found


def assert_one_line(result: tuple[int, str, str], verb: str, *fragments: str) -> None:
    code, _, err = result
    assert code == 2, err
    (line,) = (line for line in err.splitlines() if "[rank 0 " not in line)  # what was logged before the mistake showed
    assert line.startswith(f"c2g {verb}: error: ")
    for fragment in fragments:
        assert fragment in line
    assert " -- " in line, "it must say what to do"


MISTAKES = {
    "unknown key": ("train classifier={classifier} run_dir=r color=red", "'color'"),
    "unknown value": ("train classifier={classifier} run_dir=r dtype=float16", "dtype=float16", "float32"),
    "unknown generator": ("train classifier={classifier} run_dir=r generator=gan", "generator=gan", "conv, free, mlp"),
    "unknown data": ("classifier out=o data=cifar", "data=cifar", "cifar10"),
    "unknown fit": ("classifier out=o fit=hard", "fit=hard", "margin"),
    "unknown model": ("classifier out=o model=vit", "model=vit", "residual_cnn"),
    "wrong type of number": ("train classifier={classifier} run_dir=r optimizer.lr=fast", "optimizer.lr=fast"),
    "wrong type of flag": ("train classifier={classifier} run_dir=r deterministic=perhaps", "deterministic=perhaps"),
    "wrong type of list": ("train classifier={classifier} run_dir=r generator.widths=wide", "generator.widths"),
    "syntax": ("train classifier={classifier} run_dir=r steps=[1", "steps=[1"),
    "value with a sign of equality": (
        "classifier out=o fit=import fit.state_dict=epoch=3.pt",
        "fit.state_dict=epoch=3.pt",
        """'fit.state_dict="epoch=3.pt"'""",
    ),
    "value beyond ASCII": ("train classifier=c run_dir=Zürich", """'run_dir="Zürich"'"""),
    "unknown reference": ("train classifier=c run_dir=${{x}}/r", "run_dir cannot be read", "'x' not found"),
    "home folder": ("train classifier=~/no_such_folder run_dir=r", f"classifier={Path.home()}/no_such_folder"),
    "added key": ("train classifier={classifier} run_dir=r +color=red", "'color'"),
    "bad deepspeed": (
        "train classifier={classifier} run_dir=r +deepspeed.zero_optimization=7",
        "deepspeed={{'zero_optimization': 7}}",
    ),
    "no classifier": ("train run_dir=r", "classifier is not given", "classifier=VALUE"),
    "no run_dir": ("sample out=o.png", "run_dir is not given"),
    "no bundle": ("train classifier=nowhere run_dir=r", "classifier=nowhere", META),
    "empty bundle": ("train classifier={empty} run_dir=r", "{empty}", META),
    "no run": ("sample run_dir=nowhere out=o.png", "run_dir=nowhere", "config.yaml"),
    "empty run": ("evaluate run_dir={empty}", "{empty}", "config.yaml"),
    "run_dir that is a file": ("train classifier={classifier} run_dir={classifier}/bundle.json", "bundle.json"),
    "run of other settings": ("train classifier={classifier} run_dir={run} seed=5", "seed=0 there, 5 now"),
    "unknown ending": ("sample run_dir={run} out=foo.txt", "out=foo.txt", ".npz"),
    "out below a file": ("sample run_dir={run} out={classifier}/bundle.json/o.png", "o.png"),
    "no samples": ("sample run_dir={run} out=o.png count=0", "count=0"),
    "negative seed of samples": ("sample run_dir={run} out=o.png seed=-1", "seed=-1"),
    "negative seed of evaluation": ("evaluate run_dir={run} seed=-1", "seed=-1"),
    "wrong shape": ("evaluate run_dir={unrecorded_run} data=wine baselines=false", "data=wine", "[13]", "[1, 8, 8]"),
    "wrong classes": ("evaluate run_dir={unrecorded_run} data=digits baselines=false", "data=digits", "10", "2"),
    "unknown origin": ("evaluate run_dir={unrecorded_run}", "{unrecorded}", "data=NAME"),
    "data against the record": ("evaluate run_dir={run} data=wine", "data.name=wine", "digits"),
    "size against the record": ("evaluate run_dir={run} data=digits data.train_size=50", "train_size=50", "20"),
    "field of data that is not chosen": ("evaluate run_dir={run} data.train_size=50", "data", "add data=NAME"),
    "certified field of data that is not chosen": ("certify classifier={classifier} data.seed=1", "add data=NAME"),
    "certified without bundle": ("certify classifier=nowhere", "classifier=nowhere"),
    "another classifier there": ("classifier out={classifier}", "{classifier}", "overwrite=true"),
    "out below a file for a classifier": (" ".join(["classifier out={run}/config.yaml/o", *SMALL]), "config.yaml/o"),
    "no data on disk": ("classifier out=o data=mnist data.root={empty}", "{empty}"),
    "no weights": (
        "classifier out=o fit=import fit.state_dict=w.pt input_shape=[2] classes=2 normalization.kind=constant",
        "w.pt",
    ),
    "import without shape": ("classifier out=o fit=import fit.state_dict=w.pt", "input_shape"),
    "import without path": ("classifier out=o fit=import", "fit.state_dict is not given"),
    "custom model without a class": ("classifier out=o model=custom", "model._target_ is not given"),
    "unknown class": ("classifier out=o model=custom model._target_=no_such.Net " + SMALL[0], "no_such.Net"),
}


def test_a_mistake_is_one_line(c2g, places, tmp_path, monkeypatch):
    for number, (command, *fragments) in enumerate(MISTAKES.values()):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        arguments = command.format(**places).split()
        assert_one_line(c2g(*arguments), arguments[0], *(fragment.format(**places) for fragment in fragments))


def spoil(folder: Path, change) -> None:
    """Rewrite a bundle's tensors, with a right checksum."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    blob = save(tensors)
    meta = json.loads((folder / META).read_text()) | {"sha256": hashlib.sha256(blob).hexdigest()}
    (folder / WEIGHTS).write_bytes(blob)
    (folder / META).write_text(json.dumps(meta))


SPOILT = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "truncated or altered"),
    "no json": (lambda f: (f / META).write_text("{"), "bundle.json is not a bundle description"),
    "NaN": (lambda f: spoil(f, lambda t: t["model.head.weight"].fill_(float("nan"))), "weight 'head.weight' holds NaN"),
    "lost tensor": (lambda f: spoil(f, lambda t: t.pop("model.head.weight")), "missing head.weight"),
    "lost mean": (lambda f: spoil(f, lambda t: t.pop("normalization.mean")), "normalization.mean"),
    "dead": (lambda f: spoil(f, lambda t: t["model.head.weight"].zero_()), "no margin on probes"),
}


def test_a_spoilt_bundle_is_one_line(c2g, places, tmp_path, monkeypatch):
    for number, (change, fragment) in enumerate(SPOILT.values()):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        shutil.copytree(places["classifier"], "bundle")
        change(Path("bundle"))
        assert_one_line(c2g("train", "classifier=bundle", "run_dir=r", "global_batch=8"), "train", fragment)


def test_weights_of_another_net_are_one_line(c2g, tmp_path):
    torch.save({"head.weight": torch.zeros(2, 3)}, tmp_path / "w.pt")
    settings = ["fit=import", "fit.state_dict=w.pt", "input_shape=[4]", "classes=2", "normalization.kind=constant"]
    fragments = ("fit.state_dict=w.pt", "missing linear1.bias, linear1.weight", "head.weight: [2, 3] instead of [2, 5]")
    assert_one_line(c2g("classifier", "out=o", "model.width=5", *settings), "classifier", *fragments)


def test_a_net_without_rates_is_one_line(c2g):
    assert c2g("classifier", "out=gelu", "model.activation=gelu", *SMALL)[0] == 0
    result = c2g("train", "classifier=gelu", "run_dir=r")
    assert_one_line(result, "train", "module 'act1' (GELU)", "use ReLU")


def test_a_run_in_use_is_one_line(c2g, places):
    with RunDirectory(TrainConfig(classifier="c", run_dir="held")):
        result = c2g("train", f"classifier={places['classifier']}", "run_dir=held")
    assert_one_line(result, "train", "run_dir=held is in use", f"process {os.getpid()}")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the picture of what exploded
def test_an_explosion_is_one_line(c2g, places):
    rates = ["optimizer.lr=1e20", "optimizer.lr_codes=1e20"]
    result = c2g("train", f"classifier={places['classifier']}", "run_dir=r", *rates, *FEW)
    assert_one_line(result, "train", "step ", "the generator was not updated")


def test_a_message_of_several_lines_is_one_line(c2g, monkeypatch):
    def refuse(_):
        raise UserError("first\nsecond", "mend")

    monkeypatch.setattr("hpc_c2g.training.results.load_run", refuse)
    assert_one_line(c2g("sample", "run_dir=r", "out=o.png"), "sample", "first second")


def test_an_unknown_verb_is_one_line_with_a_suggestion(c2g):
    for verb, meant in (("trian", "train"), ("samples", "sample"), ("quux", None)):
        code, _, err = c2g(verb)
        assert code == 2
        wanted = f"did you mean {meant}?" if meant else f"choose one of {', '.join(VERBS)}"
        assert err == f"c2g: error: there is no verb {verb!r} -- {wanted}\n"


def test_usage_lists_the_verbs(c2g):
    for arguments, wanted in (([], 2), (["--help"], 0), (["help"], 0)):
        code, out, err = c2g(*arguments)
        assert (code, err) == (wanted, "")
        assert all(verb in out for verb in VERBS)
    assert c2g("--version")[:2] == (0, "0.1.0\n")


def leaves(value, prefix=""):
    if not isinstance(value, dict) or not value:
        return [prefix]
    return [name for key, item in value.items() for name in leaves(item, f"{prefix}.{key}" if prefix else str(key))]


def test_help_and_cfg_show_every_field_and_do_nothing(c2g, tmp_path):
    for verb in VERBS:
        code, plain, _ = c2g(verb, "--cfg", "job")
        assert code == 0
        names = leaves(OmegaConf.to_container(OmegaConf.create(plain)))
        assert {"run_dir", "out", "classifier", "study_dir"} & set(names)
        code, out, err = c2g(verb, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"c2g {verb}")
        shown = re.findall(r"^  ([\w.]+)=", out.partition("Fields and their values:")[2], re.MULTILINE)
        assert shown == names, verb
        assert list(tmp_path.iterdir()) == []


def test_help_lists_the_fields_and_choices_that_apply(c2g, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for choice, here, elsewhere in (("conv", "channels", "widths"), ("mlp", "widths", "channels")):
        _, out, _ = c2g("train", "--help", f"generator={choice}", "steps=7")
        assert re.search(rf"^  generator=conv\|free\|mlp +now {choice}$", out, re.MULTILINE)
        assert f"  generator.{here}=" in out
        assert f"  generator.{elsewhere}=" not in out
        assert "  steps=7 " in out
        fields = out.partition("Fields and their values:")[2].partition("Any field above")[0]
        assert all(len(line) <= 80 for line in fields.splitlines())
    assert c2g("train", "--help", "generator=gan")[0] == 2


def test_the_help_of_a_field_is_the_first_sentence_of_its_entry():
    @dataclass
    class Parent:
        """Settings.

        Attributes:
            a: First sentence, over
                two lines with ``code`` (see x.y). Second sentence.
            b: overridden.
        """

        a: int = 1
        b: int = 2

    @dataclass
    class Child(Parent):
        """Attributes are inherited.

        Attributes:
            b: Its own (leaky) ReLU.

        Raises:
            UserError: no field.
        """

        c: int = 3

    assert described(Child) == {"a": "First sentence, over two lines with code (see x.y)", "b": "Its own (leaky) ReLU"}


def test_the_verbs_follow_one_another(c2g, tmp_path):
    code, out, _ = c2g("classifier", "out=c", *SMALL)
    assert code == 0
    assert "bundle: c (2 classes, input [1, 8, 8])" in out
    code, out, _ = c2g("certify", "classifier=c")
    assert code == 0
    assert "verdict" in out
    assert {entry["form"] for entry in json.loads((tmp_path / "c" / "certificate.json").read_text())} >= {"identity"}
    for word in ("trained", "complete already, nothing to do"):
        code, out, _ = c2g("train", "classifier=c", "run_dir=r", *FEW)
        assert code == 0
        assert f"run: r ({word})" in out
    assert c2g("sample", "run_dir=r", "out=deep/er/s.npz", "count=7", "seed=3")[0] == 0
    with np.load(tmp_path / "deep" / "er" / "s.npz") as samples:
        assert samples["samples"].shape == (7, 1, 8, 8)
        assert samples["labels"].tolist() == [0, 1, 0, 1, 0, 1, 0]
        assert samples["classes"].tolist() == ["0", "1"]
    assert c2g("sample", "run_dir=r", "out=s.png", "count=6")[0] == 0
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (5 * (2 * 9 + 1), 5 * (3 * 9 + 1))


@pytest.mark.parametrize(("seconds", "told"), [(0.0, True), (3600.0, False)])
def test_a_long_fit_tells_a_log_file_how_far_it_is(c2g, tmp_path, monkeypatch, seconds, told):
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", seconds)
    code, _, err = c2g(
        "classifier", f"out={tmp_path / 'c'}", "model.width=20", "fit.target_margin=5", "data.classes=[0,1]"
    )
    assert code == 0
    assert ("fitting the classifier: step 50, smoothed margin" in err) == told


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 75), ("SIGUSR2", 75)])
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_signal_has_an_exit_code_of_its_own_in_every_verb_that_trains(c2g, places, monkeypatch, verb, number, code):
    def call(self, step, *rest):
        os.kill(os.getpid(), getattr(signal, number))
        return original(self, step, *rest)

    original = TrainStep.__call__
    shutil.copytree(places["run"], "run")
    monkeypatch.setattr(TrainStep, "__call__", call)
    arguments = {
        "train": ["train", f"classifier={places['classifier']}", "run_dir=new", *FEW],
        "evaluate": ["evaluate", "run_dir=run", "count=20", "classification_steps=2", "free_steps=2"],
    }[verb]
    got, _, err = c2g(*arguments)
    assert got == code
    assert err.splitlines()[-1] == f"c2g {verb}: {number}: saved after step 1; run the same command to resume"


def test_an_interrupt_without_a_checkpoint_is_one_line(c2g, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hpc_c2g.evaluation.evaluate.evaluate", interrupt)
    assert c2g("evaluate", "run_dir=r") == (130, "", "c2g evaluate: interrupted\n")


def test_a_real_process_saves_at_a_signal(places, tmp_path):
    settings = [f"classifier={places['classifier']}", "run_dir=run", *FEW, "steps=100000"]
    command = [sys.executable, "-m", "launch", "train", *settings]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            until, metrics = time.monotonic() + 120, tmp_path / "run" / "metrics.jsonl"
            while not metrics.exists() or metrics.read_text().count("\n") < 5:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < until
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            message = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 75
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert message.splitlines()[-1] == f"c2g train: SIGTERM: saved after step {step}; run the same command to resume"
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    assert "Traceback" not in message


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


def test_a_real_process_tells_a_mistake_in_one_line(tmp_path):
    command = [sys.executable, "-m", "launch", "train", "run_dir=run", "optimser.lr=1"]
    child = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert_one_line((child.returncode, child.stdout, child.stderr), "train", "'optimser.lr'", "optimizer.lr")
    assert list(tmp_path.iterdir()) == []


HEAVY = ["torch", "deepspeed", "sklearn", "matplotlib"]
"""Libraries that take seconds to import."""
IN_A_CHILD = """
import contextlib, io, json, sys
from launch.__main__ import main

lines, heavy = map(json.loads, sys.argv[1:])
for line, wanted in lines:
    sys.argv = ["c2g", *line]
    code = 0
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    print(json.dumps([line, code == wanted, [name for name in heavy if name in sys.modules]]))
"""


def test_nothing_heavy_is_imported_before_the_settings_are_right(tmp_path):
    sweep(tmp_path / "study", "cluster=debug")
    lines: list[tuple[list[str], int]] = [([verb, "--help"], 0) for verb in VERBS]
    lines += [(["--help"], 0), (["--version"], 0), (["trian"], 2)]
    lines += [([verb, "no_such_field=1"], 2) for verb in VERBS if verb not in ("doctor", "sweep")]
    lines += [(["train", "classifier=c", "run_dir=r", "steps=0"], 2), (["bound", "run_dir=r", "device=tpu"], 2)]
    lines += [(["status", "study"], 0), (["status", "--json", "study"], 0), (["status", "nowhere"], 2)]
    command = [sys.executable, "-c", IN_A_CHILD, json.dumps(lines), json.dumps(HEAVY)]
    child = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert child.returncode == 0, child.stderr
    results = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(results) == len(lines)
    assert [r for r in results if not r[1] or r[2]] == [], child.stderr


def test_a_reader_that_ends_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m launch train --help | head -1; exit ${{PIPESTATUS[0]}}"
    child = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), timeout=60)
    assert child.stdout.startswith("c2g train ")
    assert child.stderr == ""
    assert child.returncode in (0, 141)  # 0 where all was written before the reader ended
