"""Laws of ZeRO: every stage on any number of ranks is the run of one process to rounding, and goes on where it stopped.

Whole runs and bare engines are made by one process here, by 2 and by 4 ranks (one set of processes each), and compared.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.trainers import three_bundles
from torch import Tensor

from hpc_c2g.classifiers.bundle import save_bundle
from hpc_c2g.distributed.reduction import RunningSum
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.generators.config import FreeImagesConfig, MLPGeneratorConfig
from hpc_c2g.generators.latents import fresh_latents
from hpc_c2g.generators.networks import build_generator
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import CheckpointConfig, OptimizerConfig, TrainConfig
from hpc_c2g.training.engines.adam_engine import AdamEngine
from hpc_c2g.training.engines.deepspeed_engine import DeepSpeedEngine
from hpc_c2g.training.loop import train

pytestmark = pytest.mark.timeout(900)  # the first test waits for all runs, and the machine may be busy
STEPS, EVERY = 12, 3
DTYPES = ("float32", "bfloat16")
STAGES = (0, 1, 2, 3)
CLASSIFIERS = {1: (1, 3, 2, 3), 2: (1, 2, 3, 2), 4: (3, 1, 2, 3)}  # by ranks and stage
BATCH, CLIP = 24, 5.0  # between the gradient norms of the loud and the quiet steps
LOUDNESS = (50.0, 1.0, 0.02, 1.0)
GENERATORS = {  # no weight matrix can be shared evenly by 2 or 4 ranks
    "mlp": MLPGeneratorConfig(widths=[7], codes=1),
    "free": FreeImagesConfig(),
}


def base_config(folder: Path) -> TrainConfig:
    return TrainConfig(
        classifier=str(folder / "classifier0"),
        steps=STEPS,
        global_batch=32,
        device="cpu",
        generator=MLPGeneratorConfig(widths=[15], codes=3),
        alpha=AlphaConfig(init=0.5),
        log=LogConfig(every=1, progress=False, images_every=STEPS),
        checkpoint=CheckpointConfig(every=EVERY, keep=STEPS // EVERY),
    )


def several(folder: Path, count: int) -> list[str]:
    return [str(folder / f"classifier{k}") for k in range(count)]


def run_of(folder: Path, name: str, world: World | None, **changes: object) -> None:
    train(replace(base_config(folder), run_dir=str(folder / name), **changes), world)


def cut(folder: Path, source: str, name: str, step: int) -> None:
    """A copy of a run that was killed after ``step``."""
    shutil.copytree(folder / source, folder / name)
    for checkpoint in (folder / name / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


def bare_engine(kind: str, stage: int | None, micro_batches: int, world: World):
    """An engine after a few clipped steps, and the norms that it told; stage None is plain Adam."""
    box = torch.ones(1, 1, 3, 3)
    module = build_generator(GENERATORS[kind], 3, [3], [BATCH], -box, box, 0)
    config = TrainConfig(zero_stage=stage or 0, optimizer=OptimizerConfig(max_grad_norm=CLIP))
    adam = stage is None
    engine = AdamEngine(module, config.optimizer, RunningSum(world)) if adam else None
    engine = engine or DeepSpeedEngine(module, config, micro_batches, world)
    latents, target = fresh_latents(0, BATCH, 3, 3), torch.linspace(-0.5, 0.5, 9).view(1, 3, 3)
    share = BATCH // world.size
    start, stop = world.rank * share, (world.rank + 1) * share
    size, norms = share // micro_batches, []
    for loudness in LOUDNESS:
        for i in range(start, stop, size):
            micro_batch = latents[i : i + size]
            with torch.no_grad():
                engine.module(micro_batch)  # as the first pass of a step does
            x, h = engine.module(micro_batch)
            engine.backward(loudness * ((x - target).square().sum() + h.square().sum()))
        engine.reduce()
        norms.append(float(engine.gradient_norm()))
        engine.step(0.7)
    return norms, engine


def job(world: World, folder: Path) -> list[str]:
    """Everything that a set of processes does; what it finds out is written into ``folder``."""
    torch.set_num_threads(1)
    n, refused = world.size, []
    for stage in STAGES:
        micro = (None, 16 // n)[(stage + n // 2) % 2]  # so that every stage is seen in one pass and in two
        settings = {"zero_stage": stage, "micro_batch": micro, "classifier": several(folder, CLASSIFIERS[n][stage])}
        run_of(folder, f"float32-{stage}-{n}", world, **settings)
        if n != 2:
            continue
        low = {"zero_stage": stage, "micro_batch": 8, "dtype": "bfloat16"}
        run_of(folder, f"bfloat16-{stage}-{n}", world, **low)
        for dtype, again in zip(DTYPES, (settings, low), strict=True):
            name = f"{dtype}-{stage}-{n}"
            world.broadcast_from_rank0(lambda name=name: cut(folder, name, f"{name}-again", STEPS - EVERY))
            run_of(folder, f"{name}-again", world, **again)
        refused.append(poisoned(world, folder, stage))
    if n > 1:
        run_of(folder, "hops", world, zero_stage={2: 3, 4: 2}[n])
    for kind in GENERATORS if n != 2 else ():
        for stage in STAGES:
            norms, engine = bare_engine(kind, stage, 1 + stage % 2, world)
            state = engine.state_dict()
            if n == 1:  # over to another stage
                engine = bare_engine(kind, 3 - stage, 2, world)[1]
                engine.load_state_dict(state)
                state["again"] = engine.state_dict()
            torch.save([norms, state], folder / f"bare-{kind}-{stage}-{n}-{world.rank}.pt")
    return refused


def poisoned(world: World, folder: Path, stage: int) -> str:
    """A run whose last rank has a gradient that is not finite in step 3."""
    original, calls = DeepSpeedEngine.backward, []

    def backward(self: DeepSpeedEngine, surrogate: Tensor) -> None:
        calls.append(0)
        original(self, surrogate * (float("inf") if world.rank == world.size - 1 and len(calls) == 3 else 1.0))

    DeepSpeedEngine.backward = backward
    try:
        run_of(folder, f"poisoned-{stage}", world, zero_stage=stage, steps=4, checkpoint=CheckpointConfig(every=1))
    except UserError as error:
        return str(error)
    finally:
        DeepSpeedEngine.backward = original
    return "trained to its end"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; ``hops`` went 1 -> 2 -> 4 -> 1 ranks through stages 0, 3, 2, 1."""
    folder = tmp_path_factory.mktemp("zero")
    for bundle, path in zip(three_bundles(), several(folder, 3), strict=True):
        save_bundle(bundle, Path(path))
    alone = World.start("cpu", deterministic=False)
    for count in (1, 2, 3):
        run_of(folder, f"{count}-alone", alone, classifier=several(folder, count))
    job(alone, folder)
    for kind in GENERATORS:
        norms, engine = bare_engine(kind, None, 1, alone)
        torch.save([norms, engine.state_dict()], folder / f"bare-{kind}.pt")
    cut(folder, "float32-0-1", "hops", EVERY)
    for count in (2, 4):
        results = run_ranks(count, folder / "meetings", job, folder, seconds=400)
        assert [kind for kind, _ in results] == ["value"] * count, results
        (folder / f"refused-{count}.json").write_text(json.dumps([said for _, said in results]))
        shutil.move(folder / "hops", folder / f"hops-{count}")
        cut(folder, f"hops-{count}", "hops", {2: 2, 4: 3}[count] * EVERY)
    run_of(folder, "hops", alone, zero_stage=1)
    torch.use_deterministic_algorithms(False)
    run_of(folder, "adam", None, deterministic=True)
    torch.use_deterministic_algorithms(False)
    return folder


def curve(run_dir: Path) -> Tensor:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    names = ["loss", "stationarity", "rho", "gradient/generator"]
    names += [name for name in lines[0] if name.endswith("alpha")]
    return torch.tensor([[line[name] for name in names] for line in lines], dtype=torch.float64)


def engine_state(run_dir: Path, step: int | None = None) -> dict:
    last = max((run_dir / "checkpoints").iterdir())
    folder = last if step is None else last.with_name(f"step_{step:08d}")
    return torch.load(folder / "state.pt", weights_only=True)["engine"]


def flat(state: dict, what: str = "weights") -> Tensor:
    tensors = state["weights"].values() if what == "weights" else [m[what] for m in state["moments"].values()]
    return torch.cat([t.reshape(-1) for t in tensors])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def assert_same_run(run_dir: Path, other: Path, tolerance: float = 1e-4) -> None:
    mine, theirs = curve(run_dir), curve(other)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-7)  # rho is near 0
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-7)
    assert difference(flat(engine_state(run_dir)), flat(engine_state(other))) < tolerance


def test_every_stage_on_any_ranks_is_the_run_of_one_process(subtests: pytest.Subtests, done: Path) -> None:
    for ranks, stage in product([1, 2, 4], STAGES):
        with subtests.test(f"{stage=} {ranks=}"):
            assert_same_run(done / f"float32-{stage}-{ranks}", done / f"{CLASSIFIERS[ranks][stage]}-alone")


def test_the_run_of_one_process_is_that_of_plain_adam(done: Path) -> None:
    assert_same_run(done / "float32-0-1", done / "adam")
    assert engine_state(done / "adam")["updates"] == engine_state(done / "float32-0-1")["updates"] == STEPS


def test_a_killed_run_resumes_bitwise(subtests: pytest.Subtests, done: Path) -> None:
    for stage, dtype in product(STAGES, DTYPES):
        with subtests.test(f"{dtype} {stage=}"):
            whole, again = done / f"{dtype}-{stage}-2", done / f"{dtype}-{stage}-2-again"
            assert torch.equal(curve(again), curve(whole))
            for what in ("weights", "exp_avg", "exp_avg_sq"):
                assert torch.equal(flat(engine_state(again), what), flat(engine_state(whole), what))


def test_a_run_resumes_on_other_ranks_and_stages(done: Path) -> None:
    for step in (2 * EVERY, 3 * EVERY, STEPS):
        mine, whole = engine_state(done / "hops", step), engine_state(done / "float32-0-1", step)
        for what in ("weights", "exp_avg", "exp_avg_sq"):
            assert difference(flat(mine, what), flat(whole, what)) < 1e-4
        assert mine["updates"] == step
    assert_same_run(done / "hops", done / "float32-0-1")


def test_bfloat16_is_near_float32_and_keeps_float32_masters(subtests: pytest.Subtests, done: Path) -> None:
    for stage in STAGES:
        with subtests.test(f"{stage=}"):
            low, full = done / f"bfloat16-{stage}-2", done / "1-alone"
            assert bool(torch.isfinite(curve(low)).all())
            assert float((curve(low)[:, 0] / curve(full)[:, 0] - 1).abs().max()) < 0.01
            # the gradient's norm among them
            torch.testing.assert_close(curve(low)[0], curve(full)[0], rtol=0.01, atol=0.01)
            state = engine_state(low)
            assert all(t.dtype == torch.float32 for t in state["weights"].values() if t.is_floating_point())
            assert not torch.equal(flat(state), flat(state).bfloat16().float())
            for name in ("box.center", "box.half_range", "box.offset"):
                assert torch.equal(state["weights"][name], engine_state(full)["weights"][name])


def test_norm_clipping_and_moments_are_those_of_plain_adam(subtests: pytest.Subtests, done: Path) -> None:
    for ranks, stage, kind in product([1, 4], STAGES, GENERATORS):
        with subtests.test(f"{kind} {stage=} {ranks=}"):
            norms, reference = torch.load(done / f"bare-{kind}.pt", weights_only=True)
            assert min(norms) < CLIP / 2
            assert max(norms) > 2 * CLIP
            for rank in range(ranks):
                mine, state = torch.load(done / f"bare-{kind}-{stage}-{ranks}-{rank}.pt", weights_only=True)
                assert mine == pytest.approx(norms, rel=1e-5)
                assert list(state["weights"]) == list(reference["weights"])
                assert state["updates"] == len(LOUDNESS)
                for what in ("weights", "exp_avg", "exp_avg_sq"):
                    assert difference(flat(state, what), flat(reference, what)) < 1e-5, what


def test_a_state_comes_back_unchanged_from_another_stage(subtests: pytest.Subtests, done: Path) -> None:
    for stage in STAGES:
        with subtests.test(f"{stage=}"):
            for kind in GENERATORS:
                _, state = torch.load(done / f"bare-{kind}-{stage}-1-0.pt", weights_only=True)
                for what in ("weights", "exp_avg", "exp_avg_sq"):
                    assert torch.equal(flat(state["again"], what), flat(state, what))
                assert state["again"]["updates"] == state["updates"]


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_update(
    subtests: pytest.Subtests, done: Path
) -> None:
    for stage in STAGES:
        with subtests.test(f"{stage=}"):
            for said in json.loads((done / "refused-2.json").read_text()):
                assert "step 3: the term 'gradient/generator' is" in said[stage]
            assert sorted(p.name for p in (done / f"poisoned-{stage}" / "checkpoints").iterdir())[-1] == "step_00000002"


def test_a_state_of_another_network_or_format_is_named(subtests: pytest.Subtests, done: Path) -> None:
    for change, fragments in [
        (lambda s: s["weights"].pop("image"), ("missing image",)),
        (lambda s: s["weights"].update(head=torch.zeros(2)), ("unexpected head",)),
        (lambda s: s["weights"].update(image=torch.zeros(2, 3)), ("image: [2, 3] instead of [24, 1, 3, 3]",)),
        (lambda s: s["moments"]["image"].pop("exp_avg"), ("moments exp_avg", "missing image")),
        (lambda s: s.update(module=s.pop("weights")), ("no weights", "module")),
    ]:
        with subtests.test(str(fragments)):
            alone = World.start("cpu", deterministic=False)
            _, state = torch.load(done / "bare-free.pt", weights_only=True)
            change(state)
            for stage in (None, 3):
                engine = bare_engine("free", stage, 1, alone)[1]
                before = flat(engine.state_dict())
                with pytest.raises(UserError) as caught:
                    engine.load_state_dict(state)
                assert all(fragment in caught.value.problem for fragment in fragments), caught.value.problem
                assert torch.equal(flat(engine.state_dict()), before)


def test_a_stage_that_cannot_be_is_refused(subtests: pytest.Subtests) -> None:
    for settings, fragment in [
        ({"zero_stage": 4}, "zero_stage=4"),
        ({"zero_stage": 1, "deterministic": True}, "zero_stage=1"),
        ({"zero_stage": 1, "deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed.zero_optimization.stage=2"),
    ]:
        with subtests.test(fragment):
            with pytest.raises(UserError) as caught:
                TrainConfig(**settings)
            assert fragment in caught.value.problem


def test_free_settings_are_laid_over_those_of_the_stage() -> None:
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    alone = World.start("cpu", deterministic=False)
    module = build_generator(FreeImagesConfig(), 3, [3], [BATCH], -torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 0)
    engine = DeepSpeedEngine(module, TrainConfig(zero_stage=3, deepspeed=settings), 1, alone)
    assert torch.nn.functional.linear is torch._C._nn.linear  # DeepSpeed leaves everybody else's alone
    assert engine.module.image.numel() == 0  # not even a small weight is kept whole
    assert engine.weights()["image"].shape == (BATCH, 1, 2, 2)
