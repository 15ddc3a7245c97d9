"""Laws of planning: Hydra's grammar expands the grid, shared tasks exist once, and errors are raised before anything starts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_c2g.data.config import ON_DISK, DataConfig
from hpc_c2g.data.load import load_split
from hpc_c2g.errors import UserError
from hpc_c2g.fitting.config import ClassifierConfig
from hpc_c2g.settings import from_plain
from hpc_c2g.studies.config import STAGES, StudyConfig, Variant
from hpc_c2g.studies.identity import task_id
from hpc_c2g.studies.results_version import RESULTS_VERSION
from hpc_c2g.studies.stages import load_stage
from hpc_c2g.training.config.train import config_from
from launch._compose.cli import composed, config_folder, register, typed
from launch._compose.grid import expand, grid_of, plan, resolved, routes
from launch._compose.groups import SCHEMAS
from launch.sweep import SweepConfig

FOLDER = config_folder() / "study"
STUDIES = sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in FOLDER.rglob("*.yaml"))


def study(name: str) -> StudyConfig:
    register("sweep", SweepConfig, {"study": {"study": StudyConfig}})
    return typed(composed("sweep", [f"study={name}", "study_dir=s"]), SweepConfig).study


def planned(config: StudyConfig, *grid: str):
    return plan(config, expand(grid_of(config, grid)))


def of(tasks, stage: str):
    return [t for t in tasks.values() if t.stage == stage]


def test_every_study_s_own_grid_plans_into_tasks_that_depend_on_each_other(subtests):
    for name in STUDIES:
        with subtests.test(name):
            config = study(name)
            tasks = planned(config)
            assert {t.stage for t in tasks.values()} == set(config.stages)
            for task in tasks.values():
                assert [tasks[u].stage for u in task.upstream] == [
                    "train" if task.stage in ("evaluate", "bound") else "classifier"
                ] * len(task.upstream)
                assert task.inputs == tuple(tasks[u].folder for u in task.upstream)
                assert bool(task.upstream) == (task.stage != "classifier")
            assert len(of(tasks, "train")) == len(expand(grid_of(config, [])))


def test_no_study_asks_for_more_samples_than_its_data_have():
    """Of the data that the project ships."""
    tasks = [t for name in STUDIES for t in of(planned(study(name)), "classifier")]
    wanted = {str(t.config["data"]): from_plain(DataConfig, t.config["data"]) for t in tasks}
    shipped = [data for data in wanted.values() if data.name not in ON_DISK]
    assert len(shipped) > 20
    for data in shipped:
        assert len(load_split(data).train) == data.train_size


def test_the_studies_that_a_user_relies_on_are_there():
    assert {
        "multi_classifier",
        "batch_scaling",
        "data_scaling",
        "architecture",
        "sampling_bound",
        "strong_scaling",
        "weak_scaling",
    } <= set(STUDIES)


def test_the_grid_is_in_hydra_s_own_syntax(subtests):
    for grid, wanted in [
        (["a=1,2", "b=x"], [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]),
        (["a=range(3)"], [{"a": "0"}, {"a": "1"}, {"a": "2"}]),
        (["a=choice(1,2)"], [{"a": "1"}, {"a": "2"}]),
        (["a=[1,2],[3]"], [{"a": "[1,2]"}, {"a": "[3]"}]),
        (["a='x,y'"], [{"a": "'x,y'"}]),
        ([], [{}]),
    ]:
        with subtests.test(str(grid)):
            assert expand(grid) == wanted


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_points_are_the_product_of_the_fields_values_the_last_field_fastest(sizes):
    grid = [f"f{i}={','.join(map(str, range(n)))}" for i, n in enumerate(sizes)]
    points = expand(grid)
    assert [tuple(p.values()) for p in points] == list(itertools.product(*(map(str, range(n)) for n in sizes)))


def test_a_bad_grid_is_one_error_with_its_fix(subtests):
    for grid, fragments in [
        (["seed="], ("the grid of seed is empty", "seed=value1,value2")),
        (["seed=1,1"], ("a value twice",)),
        (["seed=0", "seed=1"], ("seed is in the grid twice",)),
        (["~seed"], ("is no field with values",)),
        (["seed=interval(0,1)"], ("is no list of values",)),
        (["seed=[1"], ("cannot be read",)),
        (["seed=range(200)", "steps=range(1,100)"], ("19800 points", "limit=500", "--yes")),
    ]:
        with subtests.test(str(grid)):
            with pytest.raises(UserError) as caught:
                expand(grid, 500)
            for fragment in fragments:
                assert fragment in str(caught.value)
            assert caught.value.hint


def test_a_classifier_that_several_runs_need_is_fitted_once():
    tasks = planned(study("batch_scaling"), "global_batch=20,40", "seed=0,1")
    assert [len(of(tasks, stage)) for stage in ("classifier", "certify", "train", "evaluate")] == [2, 2, 4, 4]
    assert {t.upstream for t in of(tasks, "train")} == {(t.id,) for t in of(tasks, "classifier")}


def test_a_field_goes_to_every_stage_that_has_it_and_a_named_stage_goes_first():
    stages = ("classifier", "certify", "train", "evaluate")
    assert [s for s, _ in routes("seed", stages)] == ["classifier", "train", "evaluate"]
    assert [s for s, _ in routes("data", stages)] == ["classifier"]  # the others follow its record
    assert [s for s, _ in routes("data.train_size", stages)] == ["classifier"]
    assert [s for s, _ in routes("fit.epochs", stages)] == ["classifier"]  # a field of another choice
    assert routes("train.seed", stages) == (("train", "seed"),)
    assert routes("+deepspeed.x", stages) == (("train", "+deepspeed.x"),)
    tasks = planned(study("batch_scaling"), "train.seed=5,6", "seed=0", "global_batch=20")
    assert len(of(tasks, "classifier")) == 1
    assert [t.config["seed"] for t in of(tasks, "train")] == [5, 6]


def test_an_error_in_the_grid_names_its_field_before_anything_starts(subtests):
    for grid, fragments in [
        ("sed=1", ("'sed'", "seed")),
        ("optimizer.l=1", ("'optimizer.l'", "optimizer.lr")),
        ("run_dir=x", ("run_dir is set by the study",)),
        ("train.run_dir=x", ("train.run_dir is set by the study",)),
        ("optimizer.lr=fast", ("optimizer.lr=fast",)),
        ("steps=0", ("train: steps=0",)),
        ("generator=gan", ("generator=gan", "conv, free, mlp")),
        ("data=cifar", ("data=cifar", "cifar10")),
        ("nodes=0", ("nodes=0",)),
        ("count=10,20", ("evaluate alone",)),
    ]:
        with subtests.test(grid):
            with pytest.raises(UserError) as caught:
                planned(study("batch_scaling"), grid, "global_batch=20") if grid != "variant=x" else None
            for fragment in fragments:
                assert fragment in str(caught.value)
            assert caught.value.hint


def test_one_generator_may_have_several_classifiers():
    tasks = planned(study("multi_classifier"), "variant=two_disjoint,only_0_to_4", "seed=0")
    two, one = of(tasks, "train")
    assert (len(two.upstream), len(one.upstream)) == (2, 1)
    assert one.upstream[0] in two.upstream  # fitted once for both
    classes = [tasks[u].config["data"]["classes"] for u in two.upstream]
    assert classes == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_a_variant_must_exist_and_its_classifiers_must_differ():
    with pytest.raises(UserError, match="variant=three is unknown to study=multi_classifier"):
        planned(study("multi_classifier"), "variant=three")
    twice = StudyConfig(name="x", variants={"v": Variant(classifiers=[["seed=1"], ["seed=1"]])})
    with pytest.raises(UserError, match="has a classifier twice"):
        planned(twice)


def test_nodes_make_other_runs_of_the_same_settings():
    tasks = planned(study("strong_scaling"), "nodes=1,2", "tasks_per_node=2")
    assert [(t.nodes, t.tasks_per_node) for t in of(tasks, "train")] == [(1, 2), (2, 2)]
    assert len(of(tasks, "classifier")) == 1
    assert of(tasks, "classifier")[0].ranks == 1


CASES = [
    ("train", ("steps=7", "seed=3", "optimizer.lr=0.5", "micro_batch=auto", "alpha.init=null")),
    ("train", ("generator=conv", "generator.codes=3", "steps=5")),
    ("train", ("generator=free",)),
    ("classifier", ("fit=ordinary", "fit.epochs=3", "data.classes=[1,2]", "model=cnn", "model.width=4")),
    ("evaluate", ("baselines=false", "count=5")),
]


def test_the_fast_way_to_compose_gives_what_hydra_composes(subtests):
    def check(stage, overrides):
        schema, groups = SCHEMAS[stage]
        register(stage, schema, groups)
        given = {"classifier": ["out=o"], "train": ["classifier=c", "run_dir=r"], "evaluate": ["run_dir=r"]}[stage]
        whole = typed(composed(stage, [*given, *overrides]), schema)
        values = resolved(stage, overrides)
        again = {
            "classifier": lambda: from_plain(ClassifierConfig, {**values, "out": "o"}, {"fit": groups.get("fit", {})}),
            "train": lambda: config_from({**values, "classifier": "c", "run_dir": "r"}),
            "evaluate": lambda: from_plain(schema, {**values, "run_dir": "r"}),
        }[stage]()
        assert again == whole

    for stage, overrides in CASES:
        with subtests.test(f"{stage} {overrides}"):
            check(stage, overrides)


def test_every_stage_has_work_and_a_version_of_its_results():
    for stage in STAGES:
        assert callable(load_stage(stage))
    assert tuple(RESULTS_VERSION) == STAGES
    assert min(RESULTS_VERSION.values()) >= 1


def test_an_id_depends_on_stage_settings_upstream_shape_and_version_alone():
    first = task_id("train", {"a": 1, "b": 2}, ["x"], (1, 1), 1)
    assert first == task_id("train", {"b": 2, "a": 1}, ["x"], (1, 1), 1)
    others = [
        task_id("evaluate", {"a": 1, "b": 2}, ["x"], (1, 1), 1),
        task_id("train", {"a": 1, "b": 3}, ["x"], (1, 1), 1),
        task_id("train", {"a": 1, "b": 2}, ["y"], (1, 1), 1),
        task_id("train", {"a": 1, "b": 2}, ["x"], (2, 1), 1),
        task_id("train", {"a": 1, "b": 2}, ["x"], (1, 1), 2),
    ]
    assert len({first, *others}) == 6


def test_a_stage_s_version_changes_its_tasks_and_those_that_depend_on_them(monkeypatch):
    config = study("batch_scaling")
    before = planned(config, "seed=0", "global_batch=20")
    monkeypatch.setitem(RESULTS_VERSION, "train", RESULTS_VERSION["train"] + 1)
    after = planned(config, "seed=0", "global_batch=20")
    kept = {task.stage for task in before.values() if task.id in after}
    assert kept == {"classifier", "certify"}
    assert [t.results_version for t in of(after, "train")] == [RESULTS_VERSION["train"]]


def test_stages_need_those_that_they_depend_on(subtests):
    for stages in [["train"], ["classifier", "evaluate"], ["classifier", "paint"], []]:
        with subtests.test(str(stages)), pytest.raises(UserError, match=r"study\.stages"):
            StudyConfig(name="x", stages=stages)


def test_a_study_s_name_must_be_fit_for_a_job(subtests):
    for name in ["a b", "a;b", "$(x)", "a\nb", "", "-x", "a/b", "x" * 65]:
        with subtests.test(repr(name)), pytest.raises(UserError, match=r"study\.name="):
            StudyConfig(name=name)
