"""A study's grid, expanded by Hydra's own parser and composed into tasks, all of them checked before the first one starts."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpc_c2g.errors import UserError, require
from hpc_c2g.studies.config import STAGES, StudyConfig, Variant
from hpc_c2g.studies.identity import task_id
from hpc_c2g.studies.results_version import RESULTS_VERSION
from hpc_c2g.studies.tasks import FOLDERS, Task
from launch._compose.cli import composed, config_folder, keys, readable, register, typed
from launch._compose.groups import SCHEMAS

PATHS = {
    "classifier": ("out", "overwrite"),
    "certify": ("classifier",),
    "train": ("classifier", "run_dir"),
    "evaluate": ("run_dir",),
    "bound": ("run_dir",),
}
"""Settings of each stage that the study sets itself."""
OWN = ("variant", "nodes", "tasks_per_node")
"""Fields of the grid that belong to the study, not to a stage."""
GIVEN = {"train": ["log.progress=false"]}
FOLLOWED = {"certify": "data", "evaluate": "data"}
"""Groups that a stage takes from the classifier's record; a field of the grid applies to the classifier alone."""


Point = dict[str, str]
"""Values of one point of the grid by field, as Hydra writes them."""


def expand(grid: Sequence[str], limit: int | None = None) -> list[Point]:
    """Return all points of a grid such as ``["global_batch=256,1024", "seed=range(3)"]``.

    Raises:
        UserError: The grid cannot be read, is empty, names a field twice, or has more than ``limit`` points.
    """
    axes: dict[str, list[str]] = {}
    for override in _parsed(grid):
        text = override.input_line
        if override.is_delete() or override.package is not None:
            raise UserError(f"{text!r} is no field with values", "write field=value1,value2")
        key = f"{'+' if override.is_add() or override.is_force_add() else ''}{override.key_or_group}"
        if key in axes:
            raise UserError(f"{key} is in the grid twice", f"give all its values at once: {key}=value1,value2")
        axes[key] = _values(override)
    size = 1
    for values in axes.values():
        size *= len(values)
    if limit is not None and size > limit:
        sizes = " x ".join(f"{len(v)} {k}" for k, v in axes.items() if len(v) > 1)
        raise UserError(f"the grid has {size} points ({sizes}), more than limit={limit}", "if that is meant, add --yes")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _parsed(overrides: Sequence[str]) -> list[Override]:
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except HydraException as error:
        raise readable(error, []) from error


def _values(override: Override) -> list[str]:
    key = override.key_or_group
    if override.is_discrete_sweep():
        values = [str(v) for v in override.sweep_string_iterator()]
    elif override.is_sweep_override():
        raise UserError(
            f"{override.input_line!r} is no list of values", f"write {key}=value1,value2 or {key}=range(0,3)"
        )
    else:
        values = [override.get_value_element_as_str()]
    if not values or values == [""]:
        raise UserError(f"the grid of {key} is empty", f"give at least one value: {key}=value1,value2")
    if len(set(values)) < len(values):
        raise UserError(f"{override.input_line!r} has a value twice", "give each value once")
    return values


def grid_of(study: StudyConfig, overrides: Sequence[str], before: Sequence[str] = ()) -> list[str]:
    """Return the study's own grid with the command line's overrides; all variants unless some are chosen.

    Args:
        study: Definition of the study, with its grid.
        overrides: Overrides of the command line.
        before: Grid that replaces the study's own when it is extended.
    """
    own = {key: f"{key}={_written(value)}" for key, value in study.grid.items()}
    for override in _parsed([*before, *overrides]):
        own[override.key_or_group] = override.input_line or ""
    if study.variants and "variant" not in own:
        own = {"variant": f"variant={','.join(study.variants)}", **own}
    return list(own.values())


def _written(value: Any) -> str:
    """Return a value of the study's file in Hydra's syntax: a list there is one value, a sweep is text."""
    if isinstance(value, str):
        return value
    return json.dumps(value).replace('"', "")


def plan(study: StudyConfig, points: Sequence[Point]) -> dict[str, Task]:
    """Return all tasks by id, in the order of stages and points; a task that several points need exists once.

    Args:
        study: Settings that the points share.
        points: Points of the grid.

    Raises:
        UserError: A field that no stage has, a value that a stage refuses, or two results that would share a folder.
    """
    varying = _varying(points)
    found: dict[str, Task] = {}
    places: dict[tuple[str, str], str] = {}
    for point in points:
        for task in _tasks(study, point):
            label = {k: v for k, v in point.items() if k in varying}
            before = found.get(task.id)
            points_of = (*(before.points if before else ()), label)
            found[task.id] = replace(task, points=points_of)
            other = places.setdefault((task.folder, task.stage), task.id)
            if other != task.id:
                raise UserError(
                    f"the grid changes {task.stage} alone: two results of one {task.folder.split('/')[0]} would lie in one place",
                    f"give {task.stage} one value for each of its fields",
                )
    return dict(sorted(found.items(), key=lambda item: STAGES.index(item[1].stage)))


def _varying(points: Sequence[Point]) -> set[str]:
    """Return the fields that have several values; all fields if there is one point."""
    keys = {k for p in points for k in p}
    return {k for k in keys if len({p.get(k) for p in points}) > 1} or keys


def _tasks(study: StudyConfig, point: Point) -> list[Task]:
    own = {k: v for k, v in point.items() if k in OWN}
    variant = _variant(study, own.get("variant"))
    share: dict[str, list[str]] = {stage: [] for stage in study.stages}
    # a field of one stage overrides the same field of all stages
    for key, value in sorted(point.items(), key=lambda item: item[0].partition(".")[0] in study.stages):
        if key not in OWN:
            for stage, field in routes(key, tuple(study.stages)):
                share[stage].append(f"{field}={value}")

    def settings(stage: str, *more: str) -> tuple[str, ...]:
        shared = [*getattr(study, stage), *getattr(variant, stage, [])]
        return (*GIVEN.get(stage, []), *shared, *share[stage], *more)

    def task(
        stage: str,
        overrides: tuple[str, ...],
        upstream: Sequence[Task] = (),
        inside: str | None = None,
        shape: tuple[int, int] = (1, 1),
    ) -> Task:
        ids, config = [t.id for t in upstream], resolved(stage, overrides)
        version = RESULTS_VERSION[stage]
        name = task_id(stage, config, ids, shape, version)
        folder = inside or f"{FOLDERS[stage]}/{name}"
        inputs = tuple(t.folder for t in upstream)
        return Task(name, stage, folder, config, tuple(ids), inputs, (), *shape, version, overrides)

    made: list[Task] = []
    fitted = [task("classifier", settings("classifier", *more)) for more in variant.classifiers or [[]]]
    if len({t.id for t in fitted}) < len(fitted):
        raise UserError(f"variant={own.get('variant')} has a classifier twice", "make its classifiers differ")
    made += fitted
    if "certify" in study.stages:
        made += [task("certify", settings("certify"), [t], t.folder) for t in fitted]
    if "train" in study.stages:
        shape = (
            _count(own, "nodes", variant.nodes or study.nodes),
            _count(own, "tasks_per_node", variant.tasks_per_node or study.tasks_per_node),
        )
        trained = task("train", settings("train"), fitted, shape=shape)
        made.append(trained)
        made += [task(s, settings(s), [trained], trained.folder) for s in ("evaluate", "bound") if s in study.stages]
    return made


def _variant(study: StudyConfig, name: str | None) -> Variant:
    if name is None:
        return Variant()
    if name not in study.variants:
        raise UserError(
            f"variant={name} is unknown to study={study.name}", f"choose from {', '.join(study.variants) or 'none'}"
        )
    return study.variants[name]


def _count(own: Mapping[str, str], name: str, default: int) -> int:
    text = own.get(name, str(default))
    require(text.isdigit() and int(text) >= 1, name, text, f"give {name} >= 1")
    return int(text)


@cache
def routes(key: str, stages: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return (stage, field) for every stage that a field of the grid applies to: the named one, or all that have it.

    Raises:
        UserError: No stage has it, or the study sets it itself.
    """
    bare = key.lstrip("+")
    named, _, field = bare.partition(".")
    plus = key[: len(key) - len(bare)]
    if named in stages and field:
        if field.partition(".")[0] in PATHS[named]:
            raise UserError(f"{key} is set by the study itself", f"drop {key}")
        return ((named, plus + field),)
    if any(bare.partition(".")[0] in PATHS[stage] for stage in stages):
        raise UserError(f"{key} is set by the study itself", f"drop {key}")
    top = bare.partition("/")[0].partition(".")[0]
    having = [s for s in stages if FOLLOWED.get(s) != top and (bare in _fields(s) or (plus and top in _fields(s)))]
    # a field of a chosen group, such as fit.epochs, is not among those of the default choice
    having = having or [s for s in stages if FOLLOWED.get(s) != top and "." in bare and top in _groups(s)]
    if not having:
        known = sorted({f for s in stages for f in _fields(s)} | set(OWN))
        raise readable(HydraException(f"Could not override '{bare}'. To append"), known)
    return tuple((stage, key) for stage in having)


@cache
def _base(stage: str, overrides: tuple[str, ...]) -> DictConfig:
    schema, groups = SCHEMAS[stage]
    register(stage, schema, groups)
    given = {"classifier": ["out=o"], "certify": ["classifier=c"], "train": ["classifier=[c,d]", "run_dir=r"]}
    return composed(stage, [*given.get(stage, ["run_dir=r"]), *overrides])


@cache
def _fields(stage: str) -> frozenset[str]:
    return frozenset(keys(OmegaConf.to_container(_base(stage, ()))))


@cache
def _groups(stage: str) -> frozenset[str]:
    folders = {p.name for p in config_folder().iterdir() if p.is_dir()}
    return frozenset(folders & {f.partition(".")[0] for f in _fields(stage)})


@cache
def _resolved(stage: str, overrides: tuple[str, ...]) -> str:
    """Return the stage's settings without the study's own paths, checked, as JSON."""
    groups: list[Override] = []
    plain: list[Override] = []
    for override in _parsed(overrides):
        simple = override.key_or_group not in _groups(stage) and not override.is_add() and not override.is_force_add()
        (plain if simple and not override.is_delete() else groups).append(override)
    try:
        config = copy.deepcopy(_base(stage, tuple(o.input_line or "" for o in groups)))
        for override in plain:  # as Hydra applies a value, without composing all files again
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        values = asdict(typed(config, SCHEMAS[stage][0]))
    except (HydraException, OmegaConfBaseException) as error:
        raise readable(_hydra_error(stage, overrides, error), sorted(_fields(stage))) from error
    except UserError as error:
        raise UserError(f"{stage}: {error.problem}", error.hint) from error
    return json.dumps({k: v for k, v in values.items() if k not in PATHS[stage]})


def _hydra_error(stage: str, overrides: tuple[str, ...], error: Exception) -> Exception:
    """Return Hydra's own error about overrides that it refuses, which ``readable`` can explain."""
    try:
        _base(stage, overrides)
    except (HydraException, OmegaConfBaseException) as refusal:
        return refusal
    return error


def resolved(stage: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the stage's settings without the study's own paths, checked, as plain values.

    Raises:
        UserError: A field or choice is unknown, or a value is refused.
    """
    values: dict[str, Any] = json.loads(_resolved(stage, overrides))
    return values
