"""Laws of the engine: DeepSpeed's update is Adam on the exact sum, clipped only on request, and goes on where it stopped."""

from __future__ import annotations

import io
import json

import pytest
import torch

from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.generators.config import FreeImagesConfig, MLPGeneratorConfig
from hpc_c2g.generators.latents import fresh_latents
from hpc_c2g.generators.networks import build_generator
from hpc_c2g.training.config.train import OptimizerConfig, TrainConfig
from hpc_c2g.training.engines.deepspeed_engine import DeepSpeedEngine

CPU = torch.device("cpu")
CLASSES, BATCH = 3, 9
LATENTS = fresh_latents(0, BATCH, 2, CLASSES)
LOUDNESS = (50.0, 1.0, 0.02, 1.0)
"""Factors on the surrogate, step by step: Adam forgets one common factor, but not factors that change."""


def make_generator(seed: int = 0, free: bool = False):
    config = FreeImagesConfig() if free else MLPGeneratorConfig(widths=[8], codes=2, canvas=True)
    return build_generator(config, 2, [CLASSES], [BATCH], -torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), seed)


def make_engine(micro_batches: int = 1, seed: int = 0, free: bool = False, **settings) -> DeepSpeedEngine:
    return DeepSpeedEngine(
        make_generator(seed, free), TrainConfig(**settings), micro_batches, World.start("cpu", deterministic=False)
    )


def surrogate(module, micro_batches: int, micro_batch: int, loudness: float = 1.0) -> torch.Tensor:
    """A plain sum over the samples of one of ``micro_batches`` micro-batches."""
    size = BATCH // micro_batches
    x, h = module(LATENTS)
    rows = slice(micro_batch * size, (micro_batch + 1) * size)
    target = torch.linspace(-0.5, 0.5, x[0].numel()).view(x[0].shape)
    return loudness * ((x.float()[rows] - target).square().sum() + h.float()[rows].square().sum())


def engine_steps(engine: DeepSpeedEngine, micro_batches: int, factor: float = 1.0, steps=LOUDNESS) -> None:
    for loudness in steps:
        for micro_batch in range(micro_batches):
            engine.backward(surrogate(engine.module, micro_batches, micro_batch, loudness))
        engine.reduce()
        engine.step(factor)


def adam_steps(module, clip: float = 0.0, factor: float = 1.0) -> None:
    """The reference: plain Adam on the gradient of the whole sum."""
    rates = {"images": 1e-3, "codes": 0.02, "multipliers": 0.01, "canvases": 1e-3}
    groups = [{"params": p, "lr": factor * rates[name]} for name, p in module.parameter_groups().items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    for loudness in LOUDNESS:
        optimizer.zero_grad()
        surrogate(module, 1, 0, loudness).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()


def assert_same(one, other, tolerance: float = 0.0) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_differ(one, other) -> None:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-3


@pytest.mark.parametrize("free", [False, True], ids=["generator", "free images"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_update_is_adam_on_the_exact_sum(micro_batches, free):
    engine, reference = make_engine(micro_batches, free=free), make_generator(free=free)
    engine_steps(engine, micro_batches, factor=0.7)
    adam_steps(reference, factor=0.7)
    assert_differ(reference, make_generator(free=free))
    assert_same(engine.module, reference, 2e-6)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradient_before_the_update_is_the_exact_sum_not_the_mean(micro_batches):
    engine, reference = make_engine(micro_batches), make_generator()
    for micro_batch in range(micro_batches):
        engine.backward(surrogate(engine.module, micro_batches, micro_batch))
    surrogate(reference, 1, 0).backward()
    for mine, theirs in zip(engine.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_clipping_applies_to_the_norm_of_the_sum_and_only_when_set(micro_batches):
    clip = 5.0  # between the gradient norms of the loud and the quiet steps
    engine = make_engine(micro_batches, optimizer=OptimizerConfig(max_grad_norm=clip))
    clipped, plain = make_generator(), make_generator()
    engine_steps(engine, micro_batches)
    adam_steps(clipped, clip=clip)
    adam_steps(plain)
    assert_same(engine.module, clipped, 1e-5)
    assert_differ(clipped, plain)


def test_each_parameter_group_moves_at_its_own_rate():
    rates = {"images": 0.003, "codes": 0.04, "multipliers": 0.0005, "canvases": 0.007}
    names = dict(zip(rates, ("lr", "lr_codes", "lr_multipliers", "lr_canvases"), strict=True))
    engine = make_engine(optimizer=OptimizerConfig(**{names[k]: v for k, v in rates.items()}))
    engine_steps(engine, 1, factor=0.5, steps=(1.0,))
    start = make_generator().parameter_groups()
    for name, parameters in engine.module.parameter_groups().items():
        moves = [(a - b).detach().abs().max() for a, b in zip(parameters, start[name], strict=True)]
        # Adam's first step moves every entry that has a gradient by the rate
        assert float(torch.stack(moves).max()) == pytest.approx(0.5 * rates[name], rel=1e-2)


def test_bfloat16_weights_gather_steps_below_their_own_resolution():
    engine = make_engine(dtype="bfloat16", free=True, optimizer=OptimizerConfig(lr=1e-5, lr_multipliers=1e-5))
    before = engine.module.multiplier.detach().clone()
    assert before.dtype == torch.bfloat16
    engine_steps(engine, 1, steps=[1.0] * 10)
    assert torch.equal(engine.module.multiplier, before)  # 1e-4 is less than half a unit in the last place
    engine_steps(engine, 1, steps=[1.0] * 300)
    moved = (engine.module.multiplier.detach() - before).abs().max()
    assert float(moved) == pytest.approx(310e-5, rel=0.4)
    assert bool(torch.isfinite(engine.module.multiplier).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_restored_engine_goes_on_bitwise(dtype, micro_batches):
    engine = make_engine(micro_batches, dtype=dtype)
    engine_steps(engine, micro_batches)
    file = io.BytesIO()
    torch.save(engine.state_dict(), file)
    file.seek(0)
    other = make_engine(micro_batches, seed=1, dtype=dtype)
    assert_differ(other.module, engine.module)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (engine, other):
        engine_steps(each, micro_batches, steps=(0.3, 2.0, 1.0))
    assert_same(other.module, engine.module)


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"zero_optimization": {"stage": 0, "reduce_bucket_size": -1}}, "reduce_bucket_size"),
        ({"zero_optimization": 3}, "mapping"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer"),
        ({"train_batch_size": 17}, "train_batch_size"),
        ({"gradient_accumulation_steps": "many"}, "refused"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16"),
    ],
    ids=json.dumps,
)
def test_a_bad_deepspeed_setting_is_named_in_one_line(settings, fragment):
    with pytest.raises(UserError) as caught:
        make_engine(deepspeed=settings)
    assert f"deepspeed={settings}" in caught.value.problem
    assert fragment in caught.value.problem
    assert "\n" not in str(caught.value)


def test_an_empty_deepspeed_setting_is_not_blamed(monkeypatch):
    import deepspeed

    def broken(**_):
        raise ValueError("not the user's fault")

    monkeypatch.setattr(deepspeed, "initialize", broken)
    with pytest.raises(ValueError, match="not the user's fault") as caught:
        make_engine()
    assert not isinstance(caught.value, UserError)
