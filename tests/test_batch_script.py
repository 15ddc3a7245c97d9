"""Laws of the batch script: it is what submitit submits, every value arrives as it was written, and the exit code is the truth."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import submitit
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc_c2g.errors import UserError
from hpc_c2g.scheduling.batch_script import Shape, check_folder, python_command, sbatch_text, submitit_parameters
from hpc_c2g.scheduling.profile import SlurmProfile, load_profile

GOLDEN = Path(__file__).parent / "golden"
EPILOG = "python -m epilog /runs/study"
CASES = {
    "local_array": {
        "profile": load_profile("local_slurm", {"python": "/env/bin/python"}),
        "shape": Shape(2, 4),
        "elements": 30,
        "after": ["11", "12_3"],
        "epilog": EPILOG,
    },
    "gpu_container": {
        "profile": load_profile(
            "example_gpu",
            {
                "account": "physics",
                "qos": "normal",
                "constraint": "(a100|h100)&ib",
                "exclude": "gpu[07,11]",
                "gpu_type": "a100",
                "modules": ["cuda/12.6", "nccl/2.23"],
                "container": ["apptainer", "exec", "--nv", "/images/it's torch.sif"],
                "python": "python3",
                "environment": {"SITE": 'a "quoted" $HOME; `date`'},
                "network_interface": "ib0",
                "scratch": "/scratch/local",
                "setup": ['source "/opt/site/env.sh"'],
                "extra": {"reservation": "night shift", "exclusive": True, "hint": False, "nice": 0},
            },
        ),
        "shape": Shape(4, 4),
        "epilog": EPILOG,
    },
    "single": {"profile": SlurmProfile(python="/env/bin/python"), "shape": Shape()},
}


def text_of(profile: SlurmProfile, folder: Path = Path("/runs/study"), **values) -> str:
    return sbatch_text(profile, values.pop("shape", Shape()), "study", folder, **values)


def programs(folder: Path, **bodies: str) -> Path:
    """Programs of bash, to be put first in PATH."""
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def test_the_script_is_the_golden_one(subtests):
    """With REGENERATE_GOLDEN=1 the files are rewritten: read the difference before it is committed."""
    for name in CASES:
        with subtests.test(name):
            file = GOLDEN / f"{name}.sbatch"
            text = text_of(**CASES[name])
            if os.environ.get("REGENERATE_GOLDEN"):
                file.write_text(text)
            assert text == file.read_text()
            subprocess.run(["bash", "-n", str(file)], check=True)


def test_it_is_what_submitit_submits(subtests, tmp_path, monkeypatch):
    def check(name, elements, root, patch):
        root.mkdir()
        case = CASES[name] | {"elements": elements}
        bin = programs(root / "bin", srun="", sbatch=f'cat "$1" > "{root}/seen"; echo Submitted batch job 7')
        patch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
        folder = root / "a b"
        executor = submitit.SlurmExecutor(folder, python=python_command(case["profile"]))
        keys = ("profile", "shape", "after", "epilog")
        executor.update_parameters(**submitit_parameters(job_name="study", **{k: case[k] for k in keys if k in case}))
        with executor.batch():
            for _ in range(elements):
                executor.submit(print)
        assert (root / "seen").read_text() == text_of(folder=folder, **case)

    for elements, name in product([1, 3], CASES):
        with subtests.test(f"{name} {elements=}"), monkeypatch.context() as patch:
            check(name, elements, tmp_path / f"{name}_{elements}", patch)


def test_only_the_signal_of_the_toolkit_is_sent(monkeypatch):
    from submitit.slurm.slurm import SlurmJobEnvironment

    monkeypatch.setattr(SlurmJobEnvironment, "USR_SIG", "USR1")  # SUBMITIT_PREEMPT_SIGNAL
    assert "#SBATCH --signal=USR2@120\n" in text_of(SlurmProfile())
    assert "USR1" not in text_of(SlurmProfile())


def test_resources_of_hand():
    profile = SlurmProfile(gpus_per_task=2, cpus_per_task=3, mem_gb=1.3, throttle=5)
    lines = text_of(profile, shape=Shape(3, 4), elements=9).splitlines()
    for option in ("nodes=3", "ntasks-per-node=4", "gpus-per-node=8", "cpus-per-task=3", "mem=5325M", "array=0-8%5"):
        assert f"#SBATCH --{option}" in lines
    assert not any("gpus-per-task" in line or "wckey" in line for line in lines)
    assert "#SBATCH --mem=0M" in text_of(SlurmProfile(mem_gb=0))
    assert "--mem" not in text_of(SlurmProfile())


def test_every_script_survives_requeueing_and_keeps_the_log():
    for case in CASES.values():
        lines = text_of(**case).splitlines()
        assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
        assert " --open-mode=append " in next(line for line in lines if line.startswith("srun --unbuffered"))


def test_an_impossible_shape_is_refused(subtests):
    for values in [(0, 1), (1, 0), (1.5, 1), (True, 1), ("2", 1)]:
        with subtests.test(str(values)), pytest.raises(UserError, match="whole number"):
            Shape(*values)


def test_a_job_name_has_one_meaning_everywhere(subtests):
    for name in ["", "a b", "a\n", "a,b", "$(x)", "-a", "ä"]:
        with subtests.test(repr(name)), pytest.raises(UserError, match="job name"):
            submitit_parameters(SlurmProfile(), Shape(), name)


def test_only_ids_are_waited_for(subtests):
    for job in ["", "1 2", "1:2", "1_", "x", "1\n", "٣"]:
        with subtests.test(repr(job)), pytest.raises(UserError, match="id"):
            text_of(SlurmProfile(), after=[job])


def test_no_element_is_no_array():
    with pytest.raises(UserError, match="0 elements"):
        text_of(SlurmProfile(), elements=0)


def test_the_epilog_is_one_line():
    with pytest.raises(UserError, match="control character"):
        text_of(SlurmProfile(), epilog="a\nb")


def test_a_folder_that_slurm_would_interpret_is_refused(subtests):
    for path in ["/a%b", "/a\nb", "/a'b", '/a"b', "/a\\b", "/a$b", "/a`b", "-a", "~/a", "/a\u2028", "/\ud800"]:
        with subtests.test(repr(path)):
            with pytest.raises(UserError, match="folder") as caught:
                check_folder(path)
            character = next(c for c in path if c not in "/ab")
            assert repr(character) in caught.value.problem


def test_a_folder_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_folder("a b/ä") == tmp_path / "a b" / "ä"


@dataclass
class Ran:
    """What a script did on a stage of stubs."""

    code: int
    said: str
    environment: dict[str, str]
    command: list[str]
    before: list[list[str]]
    after: list[str]
    files: list[str]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Runs a script with srun, module, mkdir and the epilog replaced by what writes down how it was called."""
    folder = tmp_path_factory.mktemp("stage")
    record = "printf '%s\\0' \"$@\""
    bin = programs(
        folder / "bin",
        srun=f'env -0 > {folder}/environment; {record} > {folder}/command; eval "$DURING"; exit 3',
        module=f'{{ {record}; echo; }} >> {folder}/before; [ "$2" != missing ]',
        mkdir=f"{{ {record}; echo; }} >> {folder}/before",
        epilog=f"{record} > {folder}/after; exit 9",
    )

    def run(text: str, **environment: str) -> Ran:
        cwd = folder / "cwd"
        cwd.mkdir(exist_ok=True)
        for name in ("environment", "command", "before", "after"):
            (folder / name).write_bytes(b"")
        script = folder / "script"
        script.write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["bash", str(script)],
            cwd=cwd,
            env={"PATH": f"{bin}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"} | environment,
            capture_output=True,
            text=True,
            timeout=20,
        )
        words = {n: (folder / n).read_bytes().decode() for n in ("environment", "command", "before", "after")}
        return Ran(
            code=done.returncode,
            said=done.stdout + done.stderr,
            environment=dict(item.split("=", 1) for item in words["environment"].split("\0")[:-1]),
            command=words["command"].split("\0")[:-1],
            before=[line.split("\0")[:-1] for line in words["before"].splitlines()],
            after=words["after"].split("\0")[:-1],
            files=sorted(path.name for path in cwd.iterdir()),
        )

    return run


def test_the_job_ends_as_the_epilog_does(stage):
    ran = stage(text_of(SlurmProfile(), epilog="epilog 'a b'"))
    assert (ran.after, ran.code, ran.said) == (["a b", "3"], 9, "")


def test_a_setup_that_stops_at_errors_does_not_stop_the_epilog(stage):
    ran = stage(text_of(SlurmProfile(setup=["set -euo pipefail"]), epilog="epilog"))
    assert (ran.after, ran.code) == (["3"], 9)
    ran = stage(text_of(SlurmProfile(setup=["set -e", "false"]), epilog="epilog"))
    assert (ran.command, ran.after, ran.code) == ([], [], 1)


def test_without_an_epilog_the_job_ends_as_its_ranks_do(stage):
    assert stage(text_of(SlurmProfile())).code == 3


@pytest.mark.parametrize("signal", ["TERM", "USR2"])
def test_the_epilog_outlives_a_signal_and_the_ranks_can_still_get_it(stage, signal):
    during = f"grep SigIgn /proc/$$/status; kill -{signal} $PPID; sleep 0.05"
    ran = stage(text_of(SlurmProfile(), epilog="epilog"), DURING=during)
    assert (ran.after, ran.code) == (["3"], 9)
    ignored = int(ran.said.split()[1], 16)
    assert ignored & (1 << 14 | 1 << 11) == 0  # TERM, USR2


def test_the_ranks_get_the_variables_of_the_profile(stage):
    profile = SlurmProfile(cpus_per_task=3, network_interface="ib0,ib1", scratch="/scratch/a b", environment={"A": 7})
    ran = stage(text_of(profile))
    expected = {
        "SRUN_CPUS_PER_TASK": "3",
        "OMP_NUM_THREADS": "3",
        "PYTHONUNBUFFERED": "1",
        "NCCL_SOCKET_IFNAME": "ib0,ib1",
        "GLOO_SOCKET_IFNAME": "ib0,ib1",
        "TMPDIR": "/scratch/a b",
        "A": "7",
    }
    assert {name: ran.environment.get(name) for name in expected} == expected
    assert ran.before == [["-p", "--", "/scratch/a b"]]


def test_the_environment_of_the_profile_has_the_last_word_but_for_setup(stage):
    profile = SlurmProfile(environment={"OMP_NUM_THREADS": "5", "B": "1"}, setup=['export B="$B$OMP_NUM_THREADS"'])
    ran = stage(text_of(profile))
    assert (ran.environment["OMP_NUM_THREADS"], ran.environment["B"]) == ("5", "15")


def test_scratch_is_made_on_every_node():
    (line,) = (line for line in text_of(SlurmProfile(scratch="/s"), shape=Shape(3, 2)).splitlines() if "mkdir" in line)
    assert line == "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 mkdir -p -- /s || exit"


def test_modules_are_loaded_and_a_missing_one_ends_the_job(stage):
    profile = SlurmProfile(purge_modules=True, modules=["cuda/12.6", "GCC/12.3.0"])
    ran = stage(text_of(profile))
    assert ran.before == [["purge"], ["load", "cuda/12.6", "GCC/12.3.0"]]
    ran = stage(text_of(SlurmProfile(modules=["missing"]), epilog="epilog"))
    assert (ran.code, ran.command, ran.after) == (1, [], [])


def test_a_variable_of_bash_arrives_or_is_refused(stage):
    names = subprocess.run(["bash", "-c", "compgen -v"], capture_output=True, text=True, check=True).stdout.split()
    allowed = {}
    for name in set(names) - {"PATH"}:
        try:
            SlurmProfile(environment={name: "a b"})
        except UserError:
            continue
        allowed[name] = "a b"
    assert len(allowed) < len(names)
    ran = stage(text_of(SlurmProfile(environment=allowed)))
    assert {name: ran.environment.get(name) for name in allowed} == allowed


HOSTILE = [
    "$(touch x)",
    "`touch x`",
    "${HOME}",
    "; touch x",
    "\n",
    "'",
    '"',
    "\\",
    "%j",
    "#",
    "&",
    "|",
    "!",
    "*",
    "~",
    " ",
    "\t",
]
HOSTILE += [
    "-",
    "--",
    "<",
    ">",
    "\r",
    "\0",
    "\u2028",
    "\u00a0",
    "ä",
    "語",
    "\u202e",
    "'; touch x; '",
    "$'\\n'",
    "\ud800",
    "=",
]
printable = st.sampled_from([text for text in HOSTILE if text.isprintable()])
anything = st.sampled_from(HOSTILE) | st.characters(exclude_categories=[])
texts = (st.lists(printable, max_size=6) | st.lists(anything, max_size=4)).map("".join)
PLACES = {
    **{name: lambda t, name=name: {name: t} for name in ("partition", "account", "qos", "constraint", "nodelist")},
    **{name: lambda t, name=name: {name: t} for name in ("exclude", "network_interface", "cpu_bind", "name", "python")},
    "gpu_type": lambda t: {"gpu_type": t, "gpus_per_task": 1},
    "modules": lambda t: {"modules": ["a", t]},
    "container": lambda t: {"container": ["apptainer", t], "python": "python3"},
    "program": lambda t: {"container": [t], "python": "python3"},
    "scratch": lambda t: {"scratch": f"/{t}"},
    "value": lambda t: {"environment": {"X_": t}},
    "variable": lambda t: {"environment": {f"X_{t}": "1"}},
    "extra": lambda t: {"extra": {"comment": t}},
    "option": lambda t: {"extra": {f"x{t}": "1"}},
}


@settings(max_examples=150, deadline=None)
@given(place=st.sampled_from(sorted(PLACES)), text=texts)
@example(place="value", text="a 'b' \"c\" $(touch x) `touch x` ${HOME} \\ ; & | ä 語 %j # ! * ~ -")
@example(place="python", text="/a b/'c'/`d`;&|ä")
@example(place="container", text="$(touch x)'\"")
@example(place="scratch", text="a b'\";`c`")
@example(place="constraint", text="(a|b)&c")
@example(place="extra", text="a ;&|()<>*? b")
def test_no_text_breaks_out_of_the_script(stage, place, text):
    """It arrives as it was written, or it was refused."""
    try:
        profile = SlurmProfile(**PLACES[place](text))
    except UserError:
        return
    script = text_of(profile, epilog="epilog")
    ran = stage(script)
    assert (ran.said, ran.files, ran.after, ran.code) == ("", [], ["3"], 9)
    begin = ran.command.index("--wait=60")
    own = [f"--cpu-bind={profile.cpu_bind}"] if profile.cpu_bind != "none" else []
    program = [*profile.container, profile.python or sys.executable]
    assert ran.command[begin + 1 :] == [*own, *program, "-u", "-m", "submitit.core._submit", "/runs/study"]
    for name, value in profile.environment.items():
        assert ran.environment[name] == value
    assert ran.environment.get("TMPDIR") == profile.scratch
    options = dict(
        ([*shlex.split(line)[1].removeprefix("--").split("=", 1), ""])[:2]
        for line in script.splitlines()
        if line.startswith("#SBATCH")
    )
    for name in ("partition", "account", "qos", "constraint", "nodelist", "exclude"):
        assert options.get(name) == getattr(profile, name)
    assert {name: options[name] for name in profile.extra} == profile.extra


@settings(max_examples=50, deadline=None)
@given(text=texts)
@example(text="a b; & | ä # *")
def test_a_folder_arrives_or_is_refused(stage, text):
    try:
        folder = check_folder(f"/x{text}")
    except UserError:
        return
    ran = stage(text_of(SlurmProfile(), folder=folder))
    assert (ran.said, ran.files, ran.code) == ("", [], 3)
    assert ran.command[-1] == str(folder)
    assert ran.command[ran.command.index("--output") + 1] == f"{folder}/%j_%t_log.out"
