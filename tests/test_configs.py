"""Laws of the settings: every yaml composes, its defaults are those of the dataclasses, and a typo is told with what was meant."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from hpc_c2g.classifiers.models import ARCHITECTURES
from hpc_c2g.data.config import DataConfig
from hpc_c2g.errors import UserError
from hpc_c2g.generators.config import FreeImagesConfig
from hpc_c2g.planning.hardware import HardwareSpec
from hpc_c2g.renamed import REMOVED, RENAMED, VALUES, refuse_old_name
from hpc_c2g.studies.config import StudyConfig
from hpc_c2g.training.config.train import OptimizerConfig, TrainConfig, config_from
from launch.__main__ import VERBS
from launch._compose.cli import composed, config_folder, keys, register, typed
from launch._compose.grid import plan as grid_plan
from launch._compose.grid import resolved

CONFIGS = config_folder()
REQUIRED = {
    "classifier": {"out": "o"},
    "certify": {"classifier": "c"},
    "train": {"classifier": "c", "run_dir": "r"},
    "sample": {"run_dir": "r", "out": "o.png"},
    "bound": {"run_dir": "r"},
    "evaluate": {"run_dir": "r"},
    "demo": {},
    "plan": {"classifier": "c"},
    "doctor": {},
    "sweep": {"study_dir": "s"},
    "status": {"study_dir": "s"},
    "logs": {"run": "r"},
    "cancel": {"study_dir": "s"},
    "retry": {"study_dir": "s"},
    "collect": {"study_dir": "s"},
    "board": {"study_dir": "s"},
    "report": {"study_dir": "s"},
    "publish": {"study_dir": "s", "out": "o"},
}
ALSO_REQUIRED = {"custom": ["model._target_=my_pkg.Net"], "import": ["fit.state_dict=w.pt"]}


@cache
def verb_schema(verb: str) -> tuple[type, dict[str, dict[str, type]]]:
    """What the verb's own ``main`` gives to ``run_verb``."""
    module = importlib.import_module(f"launch.{verb}")
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["c2g"])
        patch.setattr(module, "run_verb", lambda *arguments, **_: given.append(arguments))
        module.main()
    (name, schema, _, *groups) = given[0]
    assert name == verb
    return schema, (groups[0] if groups else {})


def compose(verb: str, *overrides: str) -> Any:
    schema, groups = verb_schema(verb)
    register(verb, schema, groups)
    required = [f"{k}={v}" for k, v in REQUIRED[verb].items()]
    return typed(composed(verb, [*required, *overrides]), schema)


def group_choices() -> list[tuple[str, str, str]]:
    """Each verb with each choice of each of its groups."""
    found = []
    for verb in VERBS:
        defaults = yaml.safe_load((CONFIGS / f"{verb}.yaml").read_text())["defaults"]
        for group in (key for entry in defaults if isinstance(entry, dict) for key in entry):
            found += [(verb, group, file.stem) for file in sorted((CONFIGS / group).glob("*.yaml"))]
    return found


def test_every_verb_has_its_yaml_and_every_yaml_its_verb():
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == {*VERBS, "verb"}
    groups = {p.parent.name for p in CONFIGS.glob("*/*.yaml")}
    assert groups == {group for _, group, _ in group_choices()}


def test_the_defaults_of_the_yaml_are_those_of_the_dataclass():
    for verb in VERBS:
        schema, _ = verb_schema(verb)
        composed_config, plain = compose(verb), schema(**REQUIRED[verb])
        if verb == "classifier":  # the choice of a model names its arguments; the next test holds them against the code
            composed_config = replace(composed_config, model=plain.model)
        if verb == "sweep":  # a study is all in its yaml; test_study_plan.py plans each
            composed_config = replace(composed_config, study=plain.study)
        assert composed_config == plain, verb


def check_choice(verb, group, choice):
    config = compose(verb, f"{group}={choice}", *ALSO_REQUIRED.get(choice, []))
    assert isinstance(config, verb_schema(verb)[0])
    value = getattr(config, group)
    if group == "data":
        assert value == DataConfig(name=choice)
    elif group == "model":
        target = value.pop("_target_")
        assert target == ("my_pkg.Net" if choice == "custom" else choice)
        parameters = inspect.signature(ARCHITECTURES[choice]).parameters.values() if choice != "custom" else []
        assert value == {p.name: p.default for p in parameters if p.default is not p.empty}
    elif group == "hardware" and choice != "here":  # its numbers are in the yaml alone
        assert isinstance(value, HardwareSpec)
        assert value.name == choice
    elif group == "study":  # likewise
        assert isinstance(value, StudyConfig)
        assert (value.name, bool(value.about)) == (choice, True)
    else:
        dataclass = verb_schema(verb)[1][group][choice]
        wanted = dataclass(state_dict="w.pt") if choice == "import" else dataclass()
        assert type(value) is dataclass
        assert value == wanted
        assert value.name == choice


def test_every_choice_of_every_group_composes_into_its_dataclass():
    assert len(group_choices()) > 30
    for verb, group, choice in group_choices():
        check_choice(verb, group, choice)


def test_free_images_bring_the_rates_of_their_own():
    config = compose("train", "generator=free")
    assert isinstance(config.generator, FreeImagesConfig)
    assert config.optimizer == OptimizerConfig(lr=0.01, lr_multipliers=0.01)
    changed = compose("train", "generator=free", "steps=7", "optimizer.lr=0.5", "generator.start=0.2")
    assert (changed.steps, changed.optimizer.lr, changed.generator.start) == (7, 0.5, 0.2)


def test_overrides_reach_the_dataclass_with_their_types():
    config = compose("train", "steps=7", "optimizer.lr=0.5", "micro_batch=3", "+deepspeed.a.b=1", "alpha.init=-2")
    assert (config.steps, config.micro_batch, config.alpha.init) == (7, 3, -2.0)
    assert config.optimizer.lr == 0.5
    assert config.deepspeed == {"a": {"b": 1}}


TYPOS = [
    ("train", "optimizer.l", "optimizer.lr"),
    ("train", "optimizer.gradient_cliping", "optimizer.max_grad_norm"),
    ("train", "stationarity.statstics", "stationarity.statistics"),
    ("train", "alpha.max_chance", "alpha.max_change"),
    ("train", "prior.total_varation", "prior.total_variation"),
    ("train", "generator.code", "generator.codes"),
    ("train", "checkpoint.evry", "checkpoint.every"),
    ("train", "log.image_every", "log.images_every"),
    ("train", "setps", "steps"),
    ("classifier", "fit.target_magin", "fit.target_margin"),
    ("classifier", "model.widht", "model.width"),
    ("classifier", "data.train_sise", "data.train_size"),
]


def exit_code(verb: str, *overrides: str) -> int:
    main = importlib.import_module(f"launch.{verb}").main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["c2g", *(f"{k}={v}" for k, v in REQUIRED[verb].items()), *overrides])
        with pytest.raises(SystemExit) as caught:
            main()
    return caught.value.code


def test_a_typo_names_the_key_and_suggests_the_right_one(capsys):
    for verb, typo, meant in TYPOS:
        assert exit_code(verb, f"{typo}=1") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"c2g {verb}: error: there is no setting {typo!r} -- did you mean {meant}")


def test_an_added_setting_is_refused(capsys):
    for addition in ("+foo=1", "+optimizer.foo=1", "+generator.foo.bar=1"):
        assert exit_code("train", addition) == 2
        (line,) = capsys.readouterr().err.splitlines()
        name = addition.removeprefix("+").removesuffix("=1")
        assert line.startswith("c2g train: error: ")
        assert name.rpartition(".")[0] or name in line
        assert "foo" in line


def test_a_missing_value_is_named():
    for field in ("classifier", "run_dir"):
        schema, groups = verb_schema("train")
        register("train", schema, groups)
        given = [f"{k}={v}" for k, v in REQUIRED["train"].items() if k != field]
        with pytest.raises(UserError, match=f"^{field} is not given"):
            typed(composed("train", given), schema)


EARLIER = {
    "plan": ("cluster", "profile", "save_profile"),
    "classifier": ("fit.optimiser", "fit.rate", "normalisation"),
}
"""Verbs other than ``train`` of settings that had another name."""
FIELDS = {"scale": "pilot_steps", "normalisation": "kind"}
"""A field of each renamed group that kept its name."""


def old_names() -> list[tuple[str, str, str]]:
    """Verb, old name and new name of every row of the table."""
    found = []
    for old, new in RENAMED.items():
        verb = next((verb for verb, names in EARLIER.items() if old in names), "train")
        field = f".{FIELDS[old]}" if old in FIELDS else ""
        found.append((verb, old + field, new + field))
        found += [
            (verb, f"{group}.{old.partition('.')[2]}", new)
            for group in FIELDS
            if RENAMED[group] == old.partition(".")[0]
        ]
    return found


def test_every_setting_that_had_another_name_is_answered_with_the_new_one_on_the_command_line(capsys):
    assert len(old_names()) > len(RENAMED)
    for verb, old, new in old_names():
        assert exit_code(verb, *(["fit=ordinary"] if old.startswith("fit.") else []), f"{old}=7") == 2
        assert capsys.readouterr().err == f"c2g {verb}: error: {old} is now called {new} -- write {new}=7\n"
        schema, groups = verb_schema(verb)
        register(verb, schema, groups)
        plain = OmegaConf.to_container(composed(verb, ["fit=ordinary"] if verb == "classifier" else []))
        assert new in set(keys(plain)), "the new name is no setting"
    for (key, old), new in VALUES.items():
        assert exit_code("train", f"{key}={old}") == 2
        assert capsys.readouterr().err == f"c2g train: error: {key}={old} is now called {new} -- write {key}={new}\n"
        assert OmegaConf.select(OmegaConf.structured(compose("train", f"{key}={new}")), key) == new
    for name in ("prior.repulsion", "gates.start", "scale.gain", "optimiser.betas"):
        assert exit_code("train", f"{name}=1") == 2
        assert f"error: {name} was removed: " in capsys.readouterr().err
    for plus in ("+", "++"):
        assert exit_code("train", f"{plus}optimiser.rate=7") == exit_code("train", f"{plus}gates.start=1") == 2
        err = capsys.readouterr().err
        assert "error: optimiser.rate is now called optimizer.lr -- write optimizer.lr=7\n" in err
        assert "error: gates.start was removed: " in err
    for name, reason in REMOVED.items():
        with pytest.raises(UserError, match=f"^{name} was removed: {reason} -- drop {name}$"):
            refuse_old_name(name)


def nested(key, value):
    group, dot, field = key.partition(".")
    return {group: {field: value}} if dot else {group: value}


def test_every_setting_that_had_another_name_is_answered_with_the_new_one_in_the_files_of_runs_and_studies():
    train = [(old, new) for verb, old, new in old_names() if verb == "train"]
    for old, new in train:
        with pytest.raises(UserError, match=f"^{old} is now called {new} -- write {new}=7$"):
            config_from({**REQUIRED["train"], **nested(old, 7)})
        with pytest.raises(UserError, match=f"{old} is now called {new} -- "):
            resolved("train", (f"{old}=7",))
        with pytest.raises(UserError, match=f"^{old} is now called {new} -- "):
            grid_plan(StudyConfig(name="s", stages=["classifier", "train"]), [{old: "7"}])
    for (key, old), new in VALUES.items():
        with pytest.raises(UserError, match=f"^{key}={old} is now called {new} -- write {key}={new}$"):
            config_from({**REQUIRED["train"], **nested(key, old)})


RANGES = [
    *("steps=0", "global_batch=0", "micro_batch=0", "micro_batch=201", "seed=-1", f"seed={2**63}", "dtype=float16"),
    *(
        "device=tpu",
        "optimizer.lr=0",
        "optimizer.lr=nan",
        "optimizer.lr=1e38",
        "optimizer.lr_codes=-1",
        "optimizer.lr_canvases=0",
    ),
    "optimizer.max_grad_norm=-1",
    *(
        "stationarity.weight=-1",
        "duality.feasibility=-1",
        "duality.slackness=-1",
    ),
    *(
        "alpha.init=1000",
        "alpha.init=nan",
        "alpha.safety_factor=0",
        "alpha.max_change=-1",
    ),
    *("prior.deviation=-1", "prior.total_variation=-1"),
    *("log.every=0", "log.images_every=0", "checkpoint.every=0", "generator.codes=-1"),
    *("deterministic_shards=0", "deterministic_shards=3", "alpha.pilot_steps=-1"),
    "generator.widths=[]",
]


@cache
def train_settings() -> DictConfig:
    schema, groups = verb_schema("train")
    register("train", schema, groups)
    return composed("train", [f"{k}={v}" for k, v in REQUIRED["train"].items()])


def test_the_settings_to_be_spoilt_are_right():
    assert isinstance(typed(train_settings(), TrainConfig), TrainConfig)


def test_a_value_out_of_range_is_refused_by_name():
    for override in RANGES:
        config = OmegaConf.merge(train_settings(), OmegaConf.from_dotlist([override]))
        with pytest.raises(UserError) as caught:
            typed(config, TrainConfig)
        assert override.partition("=")[0] in caught.value.problem
        assert caught.value.hint, override


def test_a_config_that_is_made_by_hand_is_checked_alike():
    with pytest.raises(UserError, match="steps=0"):
        TrainConfig(steps=0)
