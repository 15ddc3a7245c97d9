"""Laws of the generators: inside the box, one sample at a time, codes by quantile, seeded weights."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from hpc_c2g.errors import UserError
from hpc_c2g.generators import networks
from hpc_c2g.generators.config import ConvGeneratorConfig, FreeImagesConfig, GeneratorConfig, MLPGeneratorConfig
from hpc_c2g.generators.latents import Latents, fresh_latents
from hpc_c2g.generators.networks import Box, Generator, build_generator

CLASSES, DIMENSIONS, CODES = 3, 4, 5
KINDS = {
    "mlp": MLPGeneratorConfig(codes=CODES, widths=[10]),
    "mlp on canvases": MLPGeneratorConfig(codes=CODES, widths=[10], canvas=True),
    "mlp without codes": MLPGeneratorConfig(codes=0, widths=[10, 9]),
    "conv": ConvGeneratorConfig(name="conv", codes=CODES, channels=8),
    "conv without codes": ConvGeneratorConfig(name="conv", codes=0, channels=8),
    "free": FreeImagesConfig(name="free"),
}


def bounds(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.full(shape, -0.4, dtype=torch.float64), torch.full(shape, 0.6, dtype=torch.float64)


def build(config: GeneratorConfig, shape: tuple[int, ...] = (1, 8, 8), seed: int = 0):
    lower, upper = bounds(shape)
    return build_generator(config, DIMENSIONS, [CLASSES], [20], lower[None], upper[None], seed).double()


def latents_of(z: Tensor, labels: Tensor) -> Latents:
    return Latents(z, labels, torch.arange(len(z)), torch.zeros(len(z), dtype=torch.long))


def latents(count: int = 12, seed: int = 0) -> Latents:
    return fresh_latents(seed, count, DIMENSIONS, CLASSES)


def test_samples_have_the_shape_of_the_input_and_multipliers_a_row_of_classes(subtests):
    for kind, shape in product(KINDS, [(1, 8, 8), (3, 32, 32), (1, 28, 28), (1, 5, 3), (2,)]):
        if kind.startswith("conv") and len(shape) == 1:
            continue
        with subtests.test(f"{kind} {shape}"):
            module = build(KINDS[kind], shape)
            x, h = module(latents(7))
            assert x.shape == (7, *shape)
            assert h.shape == (7, CLASSES)


def test_a_convolution_of_rows_without_height_and_width_is_refused():
    for kind in ("conv", "conv without codes"):
        with pytest.raises(UserError, match=r"generator=conv makes images.*\[2\]"):
            build(KINDS[kind], (2,))


def test_samples_lie_in_the_box_whatever_the_weights(subtests):
    for kind in [kind for kind in KINDS if kind != "free"]:
        with subtests.test(kind):
            module = build(KINDS[kind])
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(30)
            x = module(latents())[0].detach()
            lower, upper = bounds((1, 8, 8))
            assert bool((x >= lower - 1e-12).all() and (x <= upper + 1e-12).all())
            assert float(x.max() - x.min()) > 0.9  # all of it is within reach


@settings(deadline=None, max_examples=40)
@given(st.floats(-5, 4), st.floats(0.1, 5), st.floats(-50, 50))
def test_box_starts_near_zero_where_its_slope_has_not_vanished(lower, extent, t):
    low, high = (torch.tensor([v], dtype=torch.float64) for v in (lower, lower + extent))
    box, only = Box(low[None], high[None]), torch.zeros(1, dtype=torch.long)
    x = box(torch.tensor([[t]], dtype=torch.float64), only)
    start = box(torch.zeros(1, 1, dtype=torch.float64), only)
    assert low - 1e-12 <= x <= high + 1e-12
    place = float(-(low + high) / (high - low))  # of x = 0, from -1 at the lower bound to 1 at the upper
    center, half = float(low + high) / 2, float(high - low) / 2
    assert float(start) == pytest.approx(center + half * min(0.8, max(-0.8, place)), abs=1e-9)
    if abs(place) < 0.8:
        assert float(start) == pytest.approx(0, abs=1e-9)


def test_a_sample_does_not_depend_on_its_batch_mates(subtests):
    for kind in KINDS:
        with subtests.test(kind):
            module, drawn = build(KINDS[kind]).train(), latents()
            x, h = module(drawn)
            for i in (0, 5, 11):
                alone = drawn[i : i + 1]
                x_alone, h_alone = module(alone)
                assert torch.allclose(x_alone[0], x[i], rtol=1e-10, atol=1e-12)
                assert torch.allclose(h_alone[0], h[i], rtol=1e-10, atol=1e-12)


def test_samples_differ(subtests):
    for kind in KINDS:
        with subtests.test(kind):
            x = build(KINDS[kind])(latents())[0].detach().flatten(1)
            distances = torch.cdist(x, x) + torch.eye(12)
            assert float(distances.min()) > 1e-6


def test_a_canvas_is_blank_at_first_and_then_of_its_own_code_alone():
    plain, module, drawn = build(KINDS["mlp"]), build(KINDS["mlp on canvases"]), latents()
    x = module(drawn)[0]
    assert torch.equal(x, plain(drawn)[0])
    rows = module.condition.rows(drawn)
    with torch.no_grad():
        module.canvas.weight[rows[0]] += 0.5
    changed = (module(drawn)[0] != x).flatten(1)
    assert torch.equal(changed.all(1), rows == rows[0])
    assert torch.equal(changed.any(1), rows == rows[0])
    assert any(p is module.canvas.weight for p in module.parameter_groups()["canvases"])


def test_code_is_selected_by_the_quantile_of_the_first_latent():
    module = build(KINDS["mlp"])
    for label in range(CLASSES):
        for code in range(CODES):
            z = torch.zeros(3, DIMENSIONS, dtype=torch.float64)
            z[:, 0] = torch.from_numpy(stats.norm.ppf([(code + q) / CODES for q in (0.01, 0.5, 0.99)]))
            chosen = latents_of(z, torch.full((3,), label))
            assert module.condition.rows(chosen).tolist() == [label * CODES + code] * 3
    far = latents_of(torch.tensor([[-99.0] * 4, [99.0] * 4]), torch.tensor([1, 1]))
    assert module.condition.rows(far).tolist() == [CODES, 2 * CODES - 1]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_code_decides_the_sample_with_the_other_latents_and_no_other_code_does(kind):
    module, z = build(KINDS[kind]), torch.zeros(2, DIMENSIONS, dtype=torch.float64)
    z[:, 0] = torch.tensor([0.01, 0.02])  # both in code 2 of 5

    def pair() -> tuple[Tensor, Tensor]:
        return module(latents_of(z, torch.tensor([1, 1])))

    x, h = pair()
    assert torch.allclose(x[0], x[1], rtol=1e-10, atol=1e-12)
    assert torch.equal(h[0], h[1])
    with torch.no_grad():
        for table in (module.condition.table.weight, module.multiplier.weight):
            table[[i for i in range(CLASSES * CODES) if i != CODES + 2]] += 1
        assert torch.equal(pair()[0], x)
        assert torch.equal(pair()[1], h)
        module.condition.table.weight[CODES + 2] += 1
        module.multiplier.weight[CODES + 2] += 1
    assert not torch.allclose(pair()[0], x)
    assert torch.allclose(pair()[1], h + 1, rtol=1e-12, atol=0)
    z[1, 1] = 3.0
    assert not torch.allclose(*pair()[0])


def test_without_codes_label_and_every_latent_matter_to_sample_and_multipliers():
    module = build(KINDS["mlp without codes"])
    base = module(latents_of(torch.zeros(1, DIMENSIONS), torch.tensor([0])))
    changes = [(torch.eye(DIMENSIONS)[[i]], 0) for i in range(DIMENSIONS)] + [(torch.zeros(1, DIMENSIONS), 1)]
    for z, label in changes:
        for got, there in zip(module(latents_of(z, torch.tensor([label]))), base, strict=True):
            assert (got - there).abs().max().item() > 1e-4


def test_gain_multiplies_the_latents():
    module, drawn = build(KINDS["mlp without codes"]), latents()
    x, _ = module(drawn)
    module.condition.gain *= 4
    got, _ = module(latents_of(drawn.z / 4, drawn.labels))
    assert torch.allclose(got, x, rtol=1e-10, atol=1e-12)
    assert module.condition.gain == 4 * networks.GAIN


def test_multipliers_start_neutral(subtests):
    for kind in ["mlp", "conv", "free"]:
        with subtests.test(kind):
            drawn = latents()
            _, h = build(KINDS[kind])(drawn)
            others = F.one_hot(drawn.labels, CLASSES) == 0
            assert torch.allclose((F.softplus(h) * others).sum(1), torch.ones(12).double(), rtol=1e-6)


def test_weights_are_a_function_of_the_seed_and_the_global_generator_is_untouched(subtests):
    for kind in KINDS:
        with subtests.test(kind):
            torch.manual_seed(7)
            state = torch.get_rng_state()
            first, again, other = (build(KINDS[kind], seed=seed).state_dict() for seed in (0, 0, 1))
            assert torch.equal(torch.get_rng_state(), state)
            assert all(torch.equal(v, again[k]) for k, v in first.items())
            assert any(not torch.equal(v, other[k]) for k, v in first.items())


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_output_scale_multiplies_the_last_weights_alone(kind, monkeypatch):
    small = build(KINDS[kind]).state_dict()
    monkeypatch.setattr(networks, "OUTPUT_SCALE", 3 * networks.OUTPUT_SCALE)
    large = build(KINDS[kind]).state_dict()
    changed = [k for k in small if not torch.allclose(small[k], large[k])]
    assert len(changed) == 1
    assert torch.allclose(3 * small[changed[0]], large[changed[0]], rtol=1e-6)
    assert changed[0].endswith("weight")


def test_parameter_groups_cover_every_parameter_exactly_once(subtests):
    for kind in KINDS:
        with subtests.test(kind):
            module = build(KINDS[kind])
            grouped = [id(p) for group in module.parameter_groups().values() for p in group]
            assert sorted(grouped) == sorted(id(p) for p in module.parameters())
            assert all(module.parameter_groups().values())
            x, h = module(latents(60))
            gradients = torch.autograd.grad(x.sum() + h.square().sum(), list(module.parameters()), allow_unused=True)
            assert all(g is not None for g in gradients)


def test_groups_tell_images_from_multipliers():
    module = build(KINDS["mlp without codes"])
    x, h = module(latents())
    groups = module.parameter_groups()
    for output, used, unused in ((x, "images", "multipliers"), (h, "multipliers", "images")):
        for name, wanted in ((used, True), ("codes", True), (unused, False)):
            grads = torch.autograd.grad(output.sum(), groups[name], retain_graph=True, allow_unused=True)
            assert all((g is not None) == wanted for g in grads)


def test_free_images_are_looked_up_by_index():
    module = build(KINDS["free"])  # 20 images of 3 classes
    with torch.no_grad():
        module.multiplier.copy_(torch.arange(60).view(20, 3))
    index = torch.arange(100)
    x, h = module(latents_of(torch.zeros(100, DIMENSIONS), index % CLASSES))
    places = (h[:, 0] / 3).long()
    assert torch.equal(x, module.image[places])
    assert places[:20].tolist() == list(range(20))
    assert torch.equal(places % CLASSES, index % CLASSES)  # an image keeps its label when they start again
    assert set(places[20:38].tolist()) == set(range(18))
    assert 0.005 < float(module.image.detach().std()) < 0.02


def test_fewer_free_images_than_classes_are_refused():
    with pytest.raises(UserError, match="global_batch=2 is too small"):
        build_generator(KINDS["free"], DIMENSIONS, [CLASSES], [2], *(b[None] for b in bounds((1, 8, 8))), 0)


def test_kind_asked_for_is_built_and_an_unknown_one_refused():
    assert isinstance(build(KINDS["mlp"]), Generator)
    with pytest.raises(UserError, match=r"generator\.name='gan' is unknown"):
        build(GeneratorConfig(name="gan"))


def test_settings_out_of_range_are_refused(subtests):
    for kind, field, value in [
        (MLPGeneratorConfig, "codes", -1),
        (MLPGeneratorConfig, "widths", []),
        (MLPGeneratorConfig, "widths", [8, 0]),
        (ConvGeneratorConfig, "channels", 12),
        (ConvGeneratorConfig, "channels", 0),
        (ConvGeneratorConfig, "coarsest", 0),
        (FreeImagesConfig, "start", 0.0),
    ]:
        with subtests.test(f"{kind.__name__} {field}={value}"), pytest.raises(UserError, match=rf"generator\.{field}="):
            kind(**{field: value})
