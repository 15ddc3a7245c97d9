"""Laws of a plan: more bandwidth is never slower, sharding never larger, one node is its own measure, and what does not fit says so."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_c2g.classifiers.bundle import load_bundle
from hpc_c2g.distributed.local import on_local_ranks
from hpc_c2g.errors import UserError
from hpc_c2g.planning.collectives import all_reduce_seconds, generator_seconds, ring_seconds, tree_seconds
from hpc_c2g.planning.config import PlanConfig
from hpc_c2g.planning.hardware import HardwareSpec, LocalHardware, as_yaml, load_hardware
from hpc_c2g.planning.measure import fit_ring, measure
from hpc_c2g.planning.plan import make_plan
from hpc_c2g.planning.predict import balanced, generator_bytes, memory, scaling, step_time, work_seconds
from hpc_c2g.training.cost.dry_run import DryRun, MicroBatchCost
from hpc_c2g.training.cost.op_counter import OpCost
from hpc_c2g.training.run_summary import PLAN, _plan
from launch.__main__ import main
from launch._compose.cli import config_folder

PROFILE = HardwareSpec()
NUMBERS = [f.name for f in fields(HardwareSpec) if f.name not in ("name", "asynchronous")]
COST = MicroBatchCost(
    samples=64,
    one_pass=False,
    first=OpCost(1e11, 1e8, 1e9, 100),
    second=OpCost(3e11, 3e8, 3e9, 300),
    backward=OpCost(1e10, 1e7, 1e8, 50),
    saved=OpCost(5e10, 5e7, 5e8, 60),
    residual=OpCost(0, 0, 1e9, 50),
    update=OpCost(0, 0, 1e8, 50),
    sums=(4 * 10**7 + 8, 16),
    working_bytes=10**9,
    classifier_parameters=10**7,
    generator_parameters=10**6,
)


def cost_of(samples: int, one_pass: bool) -> MicroBatchCost:
    part = samples / 64
    first, saved = (OpCost() if one_pass else work * part for work in (COST.first, COST.saved))
    return replace(COST, samples=samples, one_pass=one_pass, first=first, saved=saved, second=COST.second * part)


def test_what_is_kept_is_taken_off_the_passes_once():
    kept = step_time(COST, PROFILE, 1, 64 * 5)
    assert kept.saved == work_seconds(COST.saved, PROFILE) > 0
    afresh = step_time(replace(COST, saved=OpCost()), PROFILE, 1, 64 * 5)
    assert afresh.total - kept.total == pytest.approx(kept.saved)


def test_the_ring_and_the_tree_of_hand():
    assert ring_seconds(8e9, 4, 1e9, 1e-3) == pytest.approx(2 * 3 / 4 * 8 + 6e-3)
    assert tree_seconds(8e9, 5, 1e9, 1e-3) == pytest.approx(16 + 6e-3)
    assert ring_seconds(8e9, 1, 1e9, 1) == tree_seconds(8e9, 1, 1e9, 1) == 0


def test_an_all_reduce_adds_both_levels_and_takes_the_faster_algorithm():
    hardware = HardwareSpec(ranks_per_node=4, intra_gb_per_s=1, intra_us=1000, inter_gb_per_s=0.5, inter_us=1000)
    inside = ring_seconds(1e9, 4, 1e9, 1e-3)
    assert all_reduce_seconds(1e9, 1, hardware) == inside
    assert all_reduce_seconds(1e9, 2, hardware) == pytest.approx(inside + 2 / 2 * 1e9 / 0.5e9 + 2e-3)  # ring
    assert all_reduce_seconds(8, 1024, hardware) - ring_seconds(8, 4, 1e9, 1e-3) == pytest.approx(
        20e-3, rel=1e-3
    )  # tree


def test_the_communication_of_each_zero_stage():
    a = all_reduce_seconds(1e9, 2, PROFILE)
    assert [generator_seconds(1e9, stage, 3, 6, 2, PROFILE) / a for stage in range(4)] == pytest.approx([1, 1, 2, 6])


positive = st.floats(1e-3, 1e5)


@given(
    work=st.builds(OpCost, *[st.floats(0, 1e15)] * 3, st.floats(0, 1e5)),
    asynchronous=st.booleans(),
    name=st.sampled_from(["matrix_tflops", "memory_gb_per_s", "intra_gb_per_s", "inter_gb_per_s"]),
    factor=st.floats(1, 100),
    nodes=st.integers(1, 1024),
)
def test_faster_parts_are_never_slower(work, asynchronous, name, factor, nodes):
    slow = replace(PROFILE, asynchronous=asynchronous)
    fast = replace(slow, **{name: getattr(slow, name) * factor})
    cost = replace(COST, second=work)
    assert work_seconds(work, fast) <= work_seconds(work, slow)
    assert step_time(cost, fast, nodes, 128).total <= step_time(cost, slow, nodes, 128).total


def test_the_roofline_of_hand():
    hardware = HardwareSpec(matrix_tflops=1, memory_gb_per_s=1, operation_us=1e6, asynchronous=False)
    assert work_seconds(OpCost(2e12, 1e9, 3e9, 4), hardware) == pytest.approx(2 + 3 + 4)
    assert work_seconds(OpCost(2e12, 5e9, 3e9, 4), hardware) == pytest.approx(5 + 3 + 4)
    assert work_seconds(OpCost(2e12, 5e9, 3e9, 9), replace(hardware, asynchronous=True)) == pytest.approx(9)
    assert work_seconds(OpCost(2e12, 5e9, 3e9, 4), replace(hardware, asynchronous=True)) == pytest.approx(8)
    shared = replace(hardware, cores=2, ranks_per_node=4)  # each has half a core
    assert work_seconds(OpCost(2e12, 1e9, 3e9, 4), shared) == pytest.approx(18)


def test_memory_falls_with_the_zero_stage_and_with_the_ranks(subtests):
    for dtype, ranks in product(["float32", "bfloat16"], [2, 8, 1000]):
        with subtests.test(f"{dtype} {ranks=}"):
            totals = [sum(generator_bytes(10**6, dtype, stage, ranks)) for stage in range(4)]
            assert totals == sorted(totals, reverse=True)
            assert totals[3] < totals[0]
            for stage in range(4):
                assert sum(generator_bytes(10**6, dtype, stage, 2 * ranks)) <= totals[stage]


def test_generator_bytes_of_hand():
    assert generator_bytes(100, "float32", 0, 4) == (400, 400, 800)
    assert generator_bytes(100, "float32", 1, 4) == (400, 400, 300)
    assert generator_bytes(100, "bfloat16", 2, 4) == (200, 50, 300)
    assert generator_bytes(100, "float32", 3, 4) == (100, 100, 300)


def test_memory_adds_up():
    found = memory(COST, PROFILE, "float32", 0, 1)
    assert found.total == 2 * 2**30 + 8e7 + 16e6 + 1e9
    on_cores = memory(COST, replace(PROFILE, cores=2), "float32", 0, 1, file_bytes=7)
    assert on_cores.total == found.total + 7


def test_one_rank_does_not_communicate_and_two_do():
    alone = step_time(COST, replace(PROFILE, ranks_per_node=1), 1, 128)
    assert (alone.residual_sum, alone.generator_sum) == (0, 0)
    both = step_time(COST, replace(PROFILE, ranks_per_node=2), 1, 128)
    assert both.residual_sum > ring_seconds(4e7, 2, PROFILE.intra_gb_per_s * 1e9, 3e-6)
    assert both.computation == alone.computation


def test_overlap_hides_no_more_than_the_backward_and_needs_zero():
    at = {(s, o): step_time(COST, PROFILE, 64, 128, stage=s, overlap=o) for s in (0, 1) for o in (False, True)}
    assert at[0, True] == at[0, False]
    hidden = at[1, True].hidden
    assert hidden == min(at[1, True].generator_sum, work_seconds(COST.backward, PROFILE))
    assert at[1, True].total == pytest.approx(at[1, False].total - hidden)


@pytest.mark.parametrize("strong", [True, False])
def test_scaling_begins_at_one_and_ends_where_the_batch_does(strong):
    rows = scaling(
        cost_of, PROFILE, [2**i for i in range(11)], lambda n: 4096 if strong else 4096 * n, largest=256, strong=strong
    )
    assert rows[0].efficiency == rows[0].error == 1
    assert [r.nodes for r in rows] == [
        2**i for i in range(10 if strong else 11)
    ]  # 8192 ranks cannot share 4096 samples
    for row in rows:
        assert row.global_batch / row.ranks <= row.micro_batch * -(-row.global_batch // row.ranks // row.micro_batch)
        factor = row.nodes if strong else 1
        assert row.efficiency == pytest.approx(rows[0].step.total / row.step.total / factor)
        assert row.error == pytest.approx((rows[0].global_batch / row.global_batch) ** 0.5)
    if not strong:
        assert [r.efficiency for r in rows] == sorted((r.efficiency for r in rows), reverse=True)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_share_is_split_evenly(share, largest):
    micro = balanced(share, largest)
    assert micro <= largest
    assert -(-share // micro) == -(-share // largest)


def test_a_ring_is_recovered_from_its_times():
    sums = [(b, ring_seconds(b, 4, 2e9, 5e-5)) for b in (64, 4096, 10**6, 10**8)]
    latency, bandwidth = fit_ring(sums, 4)
    assert (latency, bandwidth) == (pytest.approx(5e-5), pytest.approx(2e9))
    assert all(value > 0 for value in fit_ring([(64, 1e-3), (10**6, 1e-4)], 2))  # nonsense of a noisy machine


def test_a_profile_names_what_is_wrong(subtests):
    for name in NUMBERS:
        with subtests.test(name):
            for value in (-1, float("nan")):
                with pytest.raises(UserError, match=rf"hardware\.{name}="):
                    HardwareSpec(**{name: value})


def test_a_saved_profile_comes_back(tmp_path):
    hardware = replace(PROFILE, name="mine", cores=3, matrix_tflops=1.5, asynchronous=False)
    (tmp_path / "mine.yaml").write_text(as_yaml(hardware))
    assert load_hardware(tmp_path / "mine.yaml") == hardware
    assert load_hardware(config_folder() / "hardware" / "a100.yaml").name == "a100"


BROKEN = [
    ("- 1", "no fields"),
    ("color: red", "color"),
    ("cores: many", "many"),
    ("cores: -1", "hardware.cores=-1"),
    (None, "No such"),
]


def test_a_broken_profile_is_told(subtests, tmp_path):
    for i, (text, told) in enumerate(BROKEN):
        file = tmp_path / f"{i}.yaml"
        with subtests.test(told):
            if text is not None:
                file.write_text(text)
            with pytest.raises(UserError, match=told):
                load_hardware(file)


@pytest.fixture
def h100() -> HardwareSpec:
    return load_hardware(config_folder() / "hardware" / "h100.yaml")


def test_a_plan_is_deterministic_and_consistent(bundle_dir, h100):
    config = PlanConfig(classifier=str(bundle_dir), global_batch=4096, hardware=h100, max_nodes=8)
    plan, again = make_plan(config), make_plan(config)
    assert plan.record() == again.record()
    assert json.loads(json.dumps(plan.record()))["strong"][0]["efficiency"] == 1
    assert (plan.zero_stage, plan.share, plan.micro_batch) == (0, 512, 512)
    assert plan.memory.total <= plan.available
    assert plan.strong[0].step == plan.weak[0].step == plan.step


def test_the_summary_of_a_run_shows_the_plan_in_its_folder(bundle_dir, h100, tmp_path):
    plan = make_plan(PlanConfig(classifier=str(bundle_dir), global_batch=4096, hardware=h100, max_nodes=1))
    (tmp_path / PLAN).write_text(json.dumps(plan.record()))
    table = _plan(tmp_path / PLAN)
    assert f"| hardware | {h100.name} |" in table
    assert f"| seconds per step | {plan.step.total:.4g} |" in table


def test_a_tight_memory_lowers_the_micro_batch_then_raises_the_stage_then_fails(bundle_dir, h100):
    def planned(gib: float, **settings):
        cluster = replace(h100, memory_gib=gib, runtime_gib=0.0)
        return make_plan(
            PlanConfig(
                classifier=str(bundle_dir), global_batch=8192, hardware=cluster, max_nodes=1, margin=0, **settings
            )
        )

    roomy = planned(1.0)
    assert roomy.micro_batch == roomy.share == 1024
    state = roomy.memory.total - roomy.memory.working
    one = bytes_of_one(bundle_dir)
    tight = planned((state + 4 * one) / 2**30)
    assert tight.micro_batch < roomy.micro_batch
    assert tight.zero_stage == 0
    sharded = planned((state + 0.5 * one) / 2**30)
    assert sharded.zero_stage > 0
    with pytest.raises(
        UserError, match=r"micro_batch=1 needs .* GiB per rank, .* GiB are there \(hardware h100"
    ) as caught:
        planned(one / 2**31)
    assert "zero_stage=3" in caught.value.hint
    just = roomy.memory.total + 1024
    assert planned(just / 2**30, micro_batch=1024, zero_stage=0).micro_batch == 1024
    with pytest.raises(UserError, match="micro_batch=1024 needs"):
        planned((just - 2048) / 2**30, micro_batch=1024, zero_stage=0)


def bytes_of_one(bundle_dir: Path) -> int:
    return DryRun(load_bundle(bundle_dir), PlanConfig(classifier=str(bundle_dir))).working_bytes(1)


def test_a_plan_s_settings_are_checked(subtests):
    for settings, told in [
        ({"nodes": 0}, "nodes=0"),
        ({"max_nodes": 0}, "max_nodes=0"),
        ({"zero_stage": 4}, "zero_stage=4"),
        ({"margin": 1.0}, "margin=1.0"),
        ({"steps": 0}, "steps=0"),
    ]:
        with subtests.test(told), pytest.raises(UserError, match=told):
            PlanConfig(classifier="c", **settings)


def test_a_batch_smaller_than_the_ranks_and_several_classifiers_are_told(bundle_dir, h100):
    with pytest.raises(UserError, match=r"global_batch=20 is too small for 24 ranks \(nodes=3\)"):
        make_plan(PlanConfig(classifier=str(bundle_dir), global_batch=20, nodes=3, hardware=h100))
    with pytest.raises(UserError, match="plan one classifier at a time"):
        PlanConfig(classifier=["a", "b"])


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["c2g", "plan", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_verb_prints_its_tables_and_writes_its_files(bundle_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [f"classifier={bundle_dir}", "global_batch=4096", "hardware=h100", "nodes=2", "max_nodes=4"]
    assert run(monkeypatch, *arguments, "out=p.json", "save_hardware=mine.yaml", "generator=free") == 0
    text = capsys.readouterr().out
    for word in (
        "memory per rank",
        "ZeRO stage 0",
        "one step on 2 node(s), 16 rank(s)",
        "strong scaling",
        "weak scaling",
    ):
        assert word in text
    record = json.loads(Path("p.json").read_text())
    assert record["nodes"] == 2
    assert record["step"]["total"] == pytest.approx(sum(v for k, v in record["step"].items() if k != "total"))
    assert (
        run(
            monkeypatch,
            *arguments[:2],
            "hardware_file=mine.yaml",
            "nodes=2",
            "max_nodes=1",
            "generator=free",
            "out=q.json",
        )
        == 0
    )
    assert json.loads(Path("q.json").read_text())["step"] == record["step"]
    assert run(monkeypatch, *arguments, "hardware_file=none.yaml") == 2
    assert "hardware_file=none.yaml cannot be read" in capsys.readouterr().err


def test_help_tells_the_choices_that_there_are(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    clusters = sorted(p.stem for p in (config_folder() / "hardware").glob("*.yaml"))
    assert sorted(text.partition("hardware=")[2].partition(" ")[0].split("|")) == clusters
    generators = sorted(p.stem for p in (config_folder() / "generator").glob("*.yaml"))
    assert sorted(text.partition("generator=")[2].partition("]")[0].split("|")) == generators
    usage, _, fields = text.partition("Fields and their values:")
    named = {part for name in re.findall(r"^  ([\w.]+)=", fields, re.MULTILINE) for part in (name, name.split(".")[0])}
    for field in re.findall(r"\[?(\w+)=", usage):
        assert field in named, "the help names a field that there is not"


def test_this_machine_is_measured_without_training(bundle):
    cost = DryRun(bundle, PlanConfig(global_batch=64)).cost(16)
    hardware = measure(LocalHardware(ranks_per_node=2, seconds=0.02), cost)
    assert hardware.ranks_per_node == 2
    assert 0.05 < hardware.runtime_gib < 4
    assert hardware.matrix_tflops > 0
    assert hardware.intra_gb_per_s == hardware.inter_gb_per_s > 0


def dies(world) -> None:
    raise RuntimeError(f"rank {world.rank} is out")


def test_a_process_that_fails_is_told():
    with pytest.raises(UserError, match=r"process 0 of 1: RuntimeError: rank 0 is out"):
        on_local_ranks(1, dies)
