"""Laws of a Slurm profile: an error names its field and the fix, and nothing but `setup` is shell."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from hpc_c2g.errors import UserError
from hpc_c2g.scheduling.profile import SlurmProfile, load_profile, profile_names, profiles_folder

HOSTILE = [
    "a b",
    "a\nb",
    "$(touch x)",
    "`touch x`",
    "a;b",
    "a'b",
    'a"b',
    "a\\b",
    "a%b",
    "a#b",
    "ä",
    "-a",
    "",
    "a\n",
    "٣",
]
STRICT = [
    "name",
    "partition",
    "account",
    "qos",
    "constraint",
    "nodelist",
    "exclude",
    "gpu_type",
    "network_interface",
    "cpu_bind",
]
GOOD = {
    "partition": ["main", "main,low"],
    "constraint": ["ib&a100", "(a|b)&c", "[rack1*2&rack2*4]", "icelake"],
    "nodelist": ["n1", "gpu[01-04,7],cpu3"],
    "gpu_type": ["a100", "nvidia_h100_80gb_hbm3"],
    "network_interface": ["ib0", "ib0,ib1", "eth0:1", "bond0.7"],
    "cpu_bind": ["cores", "none", "verbose,cores", "map_cpu:0,1", "mask_cpu:0xF,0xF0"],
}


def profile(**values) -> SlurmProfile:
    return SlurmProfile(**({"gpus_per_task": 1} | values))


@pytest.mark.parametrize("name", profile_names())
def test_each_profile_loads_and_bears_the_name_of_its_file(name):
    assert load_profile(name).name == name


def test_the_templates_show_every_field_between_them():
    text = "".join((profiles_folder() / f"{name}.yaml").read_text() for name in ("example_cpu", "example_gpu"))
    assert [f.name for f in fields(SlurmProfile) if f"\n{f.name}:" not in text] == []


def test_four_tasks_fit_on_a_node_of_the_local_cluster():
    local = load_profile("local_slurm")
    assert 4 * local.cpus_per_task <= 4
    assert 4 * local.mem_gb * 1024 <= 8000


def refusal(**values) -> UserError | None:
    """The error that the profile's values raise."""
    try:
        profile(**values)
    except UserError as error:
        return error
    return None


def test_a_name_with_a_hostile_character_is_refused_with_its_field_and_value():
    accepted, unclear = [], []
    for field in STRICT:
        for text in HOSTILE:
            error = refusal(**{field: text})
            if error is None:
                accepted.append((field, text))
            elif field not in error.problem or repr(text) not in error.problem or not error.hint:
                unclear.append((field, text, str(error)))
    assert accepted == []
    assert unclear == []
    assert len(STRICT) * len(HOSTILE) == 150


def test_names_that_clusters_use_are_accepted():
    for field, texts in GOOD.items():
        for text in texts:
            assert getattr(profile(**{field: text}), field) == text


IMPOSSIBLE = [
    ("gpus_per_task", -1),
    ("cpus_per_task", 0),
    ("cpus_per_task", 1.5),
    ("cpus_per_task", True),
    ("time_minutes", 0),
    ("throttle", 0),
    ("max_array", "8"),
    ("mem_gb", -1),
    ("mem_gb", math.nan),
    ("mem_gb", "4"),
    ("signal_seconds", 0),
    ("signal_seconds", 3600),
    ("signal_seconds", 70_000),
    ("purge_modules", 1),
    ("modules", "cuda"),
    ("modules", ["-f"]),
    ("modules", ["a b"]),
    ("setup", ["a\nb"]),
    ("setup", ["a\0b"]),
    ("setup", [3]),
    ("container", ["", "a"]),
    ("container", ["--nv"]),
    ("container", ["apptainer", "a\nb"]),
    ("container", ["apptainer"]),
    ("python", "~/venv/bin/python"),
    ("python", "$HOME/venv/bin/python"),
    ("python", "-python"),
    ("python", ""),
    ("python", "a\rb"),
    ("scratch", "tmp"),
    ("scratch", "/scratch/$USER"),
    ("scratch", "/scratch\n"),
    ("environment", ["A"]),
    ("environment", {"A B": "1"}),
    ("environment", {"A;B": "1"}),
    ("environment", {"Ä": "1"}),
    ("environment", {"BASH_ENV": "$(touch x)"}),
    ("environment", {"PS4": "$(touch x)"}),
    ("environment", {"A": "1\n2"}),
    ("environment", {"A": "1\u2028"}),
    ("environment", {"A": "\ud800"}),
    ("environment", {"A": True}),
    ("environment", {"A": 1.5}),
    ("environment", {"A": None}),
    ("extra", ["a"]),
    ("extra", {"-p": "main"}),
    ("extra", {"a=b": 1}),
    ("extra", {"comment": "a\nb"}),
    ("extra", {"comment": "it's"}),
    ("extra", {"comment": "ä"}),
    ("extra", {"comment": 1.5}),
    ("extra", {"comment": ""}),
]


def test_an_impossible_value_is_refused_with_its_field():
    accepted, unclear = [], []
    for field, value in IMPOSSIBLE:
        error = refusal(**{field: value})
        if error is None:
            accepted.append((field, value))
        elif field not in str(error) or not error.hint:
            unclear.append((field, value, str(error)))
    assert accepted == []
    assert unclear == []


@pytest.mark.parametrize(("option", "field"), [("time", "time_minutes"), ("gpus", "gpus_per_task"), ("tim", "time_")])
def test_an_option_that_is_a_field_is_no_extra(option, field):
    with pytest.raises(UserError, match=f"set {field}"):
        profile(extra={option: "1"})


@pytest.mark.parametrize("option", ["output", "outp", "array", "requeue", "no-requeue", "wrap", "ntasks"])
def test_what_submission_depends_on_cannot_be_changed(option):
    with pytest.raises(UserError, match=option):
        profile(extra={option: "1"})


def test_memory_is_asked_for_once():
    with pytest.raises(UserError, match="mem_gb=null"):
        profile(mem_gb=2, extra={"mem-per-cpu": "1G"})
    assert profile(extra={"mem-per-cpu": "1G", "nice": 0, "exclusive": True, "reservation": "night"}).extra["nice"] == 0


def test_a_gpu_type_needs_gpus():
    with pytest.raises(UserError, match="gpus_per_task"):
        SlurmProfile(gpu_type="a100")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_is_read_as_it_is_written_and_named_after_itself(tmp_path):
    setup = "export X=${HOME:-$(pwd)} Y=\\${Z} W=${A[@]%%.*} V='${'"
    text = f"setup:\n  - |-\n    {setup}\nenvironment: {{A: '${{HOME}}', B: 3, C: '03'}}\nmem_gb: 2\n"
    loaded = load_profile(write(tmp_path / "mine.yaml", text))
    assert (loaded.name, loaded.setup, loaded.mem_gb) == ("mine", [setup], 2.0)
    assert loaded.environment == {"A": "${HOME}", "B": 3, "C": "03"}
    assert load_profile(write(tmp_path / "empty.yaml", "")) == SlurmProfile(name="empty")


def test_overrides_merge_dicts_and_replace_lists(tmp_path):
    file = write(tmp_path / "mine.yaml", "environment: {A: a, B: b}\nmodules: [one, two]\npartition: main\n")
    overrides = {"environment": {"B": "${c}"}, "modules": ["three"], "partition": None, "time_minutes": 7}
    for given in (overrides, overrides | {"modules": OmegaConf.create(["three"])}):
        loaded = load_profile(file, given)
        assert (loaded.environment, loaded.modules) == ({"A": "a", "B": "${c}"}, ["three"])
        assert (loaded.partition, loaded.time_minutes) == (None, 7)


@pytest.mark.parametrize("text", ["n: [", "[1, 2]", "hello", "a: 1\na: 2"])
def test_a_file_that_is_no_profile_says_so(tmp_path, text):
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load_profile(write(tmp_path / "mine.yaml", text))


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_profile(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", ["local", "../profiles/local_slurm", "xyzzy"])
def test_an_unknown_profile_lists_those_that_exist(name):
    with pytest.raises(UserError, match="example_cpu, example_gpu, local_slurm") as caught:
        load_profile(name)
    assert ("did you mean local_slurm" in str(caught.value)) == (name != "xyzzy")


def test_an_unknown_field_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"mine\.yaml.*'partitions'.*did you mean partition"):
        load_profile(write(tmp_path / "mine.yaml", "partitions: main"))
    with pytest.raises(UserError, match=r"overrides.*'time'.*did you mean time_minutes"):
        load_profile("local_slurm", {"time": 3})
    with pytest.raises(UserError, match="the fields are name, partition"):
        load_profile("local_slurm", {"xyzzy": 3})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time_minutes", "soon"),
        ("time_minutes", 1.5),
        ("mem_gb", "much"),
        ("modules", "cuda"),
        ("environment", ["A"]),
        ("environment", {"A": 1.5}),
        ("extra", {"a": [1]}),
        ("name", None),
        ("time_minutes", "${x}"),
    ],
)
def test_a_wrong_type_names_its_field(field, value):
    with pytest.raises(UserError, match=field):
        load_profile("local_slurm", {field: value})
