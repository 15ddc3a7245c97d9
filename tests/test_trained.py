"""Laws of a trained generator: what a sample depends on, how often each is drawn, and that a run is read without its classifier."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hpc_c2g.classifiers.bundle import save_bundle
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.errors import UserError
from hpc_c2g.generators import networks
from hpc_c2g.generators.config import DRAWINGS, ConvGeneratorConfig, FreeImagesConfig, MLPGeneratorConfig
from hpc_c2g.generators.latents import fresh_latents
from hpc_c2g.generators.networks import build_generator
from hpc_c2g.generators.trained import Member, TrainedGenerator, members_from, systematic_resample
from hpc_c2g.monitoring.config import LogConfig
from hpc_c2g.training.checkpoints import Checkpoints
from hpc_c2g.training.config.objective import AlphaConfig
from hpc_c2g.training.config.train import CheckpointConfig, TrainConfig
from hpc_c2g.training.loop import train
from hpc_c2g.training.results import load_run
from hpc_c2g.training.run_directory import RunDirectory

CLASSES, SHAPE = 3, (1, 4, 4)
NORMALIZATION = Normalization.constant(SHAPE, mean=0.4, scale=0.25, value_range=(-1.0, 2.0))
GENERATORS = {
    "codes": MLPGeneratorConfig(widths=[16], codes=4),
    "no codes": MLPGeneratorConfig(widths=[16], codes=0),
    "conv": ConvGeneratorConfig(channels=8, codes=4),
}


def make(config=GENERATORS["codes"], count: int = 12) -> TrainedGenerator:
    lower, upper = (bound.float() for bound in NORMALIZATION.box())
    with mock.patch.object(networks, "OUTPUT_SCALE", 20.0):  # samples far apart
        module = build_generator(config, 2, [CLASSES], [count], lower[None], upper[None], seed=0)
    return TrainedGenerator(module, 2, [Member(0, 0, ["a", "b", "c"], NORMALIZATION)])


def make_free(count: int) -> TrainedGenerator:
    """Free images that show their own index: image i is i everywhere, with multipliers that grow with i."""
    trained = make(FreeImagesConfig(), count)
    with torch.no_grad():
        trained.module.image.copy_(torch.arange(count)[:, None, None, None].expand(-1, *SHAPE))
        trained.module.multiplier.copy_(torch.arange(count)[:, None].expand(-1, CLASSES))
    return replace(
        trained,
        members=[replace(trained.members[0], normalization=Normalization.constant(SHAPE, value_range=(0.0, 100.0)))],
    )


def shown(samples: torch.Tensor) -> torch.Tensor:
    return samples[:, 0, 0, 0].round().long()


def test_samples_depend_on_the_seed_alone(subtests):
    for drawing, kind in product(DRAWINGS, GENERATORS):
        with subtests.test(f"{kind} {drawing}"):
            trained = make(GENERATORS[kind])
            torch.manual_seed(1)
            first, labels = trained.sample(20, 5, drawing)
            torch.manual_seed(2)
            again, labels_again = trained.sample(20, 5, drawing)
            assert torch.equal(first, again)
            assert torch.equal(labels, labels_again)
            other, _ = trained.sample(20, 6, drawing)
            assert float((first - other).abs().mean()) > 1e-3


def test_labels_cycle_whatever_the_count(subtests):
    for drawing, count in product(DRAWINGS, [1, 2, 3, 11]):
        with subtests.test(f"{count=} {drawing}"):
            samples, labels = make().sample(count, 0, drawing)
            assert samples.shape == (count, *SHAPE)
            assert samples.dtype == torch.float32
            assert labels.tolist() == [i % CLASSES for i in range(count)]


def test_plain_samples_do_not_change_with_the_count_or_the_chunk(monkeypatch):
    trained = make()
    many, _ = trained.sample(50, 0, "plain")
    few, _ = trained.sample(7, 0, "plain")
    torch.testing.assert_close(many[:7], few, rtol=0, atol=1e-5)
    monkeypatch.setattr("hpc_c2g.generators.trained.CHUNK", 8)
    torch.testing.assert_close(trained.sample(50, 0, "plain")[0], many, rtol=0, atol=1e-5)


def test_raw_samples_stay_within_the_value_range_and_use_it(subtests):
    for kind in GENERATORS:
        with subtests.test(kind):
            samples, _ = make(GENERATORS[kind]).sample(300, 0)
            assert float(samples.min()) >= -1 - 1e-5
            assert float(samples.max()) <= 2 + 1e-5
            assert float(samples.max() - samples.min()) > 1.5  # the last weights are loud enough to reach the edges


def test_samples_of_a_class_are_made_for_that_class():
    trained = make()
    with torch.no_grad():  # each class's codes all over its own place in the table
        rows = torch.arange(CLASSES).repeat_interleave(4).float()
        trained.module.condition.table.weight.copy_((rows - 1)[:, None].expand(-1, 64))
    for drawing in DRAWINGS:
        samples, labels = trained.sample(60, 0, drawing)
        means = torch.stack([samples[labels == c].mean(0).flatten() for c in range(CLASSES)])
        spread = max(float(samples[labels == c].std(0).max()) for c in range(CLASSES))
        assert float(torch.pdist(means).min()) > 5 * spread


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-3),
    st.integers(1, 60),
    st.integers(0, 2**31),
)
def test_each_index_is_drawn_the_floor_or_the_ceiling_of_its_expectation(weights, count, seed):
    weights = torch.tensor(weights, dtype=torch.float64)
    drawn = systematic_resample(weights, count, torch.Generator().manual_seed(seed))
    assert drawn.shape == (count,)
    expected = count * weights / weights.sum()
    for number, expectation in zip(torch.bincount(drawn, minlength=len(weights)), expected.tolist(), strict=True):
        assert math.floor(expectation - 1e-9) <= number <= math.ceil(expectation + 1e-9)


def test_resampling_is_unbiased_and_shuffled():
    weights = torch.tensor([0.15, 0.35, 0.5])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([systematic_resample(weights, 4, generator) for _ in range(4000)])
    frequencies = torch.bincount(draws.flatten(), minlength=3) / draws.numel()
    torch.testing.assert_close(frequencies, weights, rtol=0, atol=0.01)
    # at every place, not only over all of them
    first = torch.bincount(draws[:, 0], minlength=3) / len(draws)
    torch.testing.assert_close(first, weights, rtol=0, atol=0.03)


class Quarters(nn.Module):
    """Shows the quarter 0..3 of the first latent; its multipliers are as large as that number."""

    def __init__(self) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(()))

    def forward(self, latents):
        quarter = (torch.special.ndtr(latents.z[:, 0]) * 4).floor().float().clamp(0, 3)
        h = torch.log(torch.expm1((quarter / (CLASSES - 1)).clamp_min(1e-9)))
        own = torch.arange(CLASSES) == latents.labels[:, None]
        h = torch.where(own, 50.0, h[:, None])  # what stands at the sample's own class is no multiplier
        return quarter[:, None, None, None].expand(-1, *SHAPE), h


def test_samples_are_drawn_in_proportion_to_their_multipliers_within_each_class():
    trained = TrainedGenerator(
        Quarters(), 2, [Member(0, 0, ["a", "b", "c"], Normalization.constant(SHAPE, value_range=(0.0, 100.0)))]
    )
    frequencies_of = {"multipliers": [0, 1 / 6, 2 / 6, 3 / 6], "supported": [0, 0, 0.5, 0.5], "plain": [0.25] * 4}
    for drawing, wanted in frequencies_of.items():
        samples, labels = trained.sample(3000, 0, drawing)
        for c in range(CLASSES):
            frequencies = torch.bincount(shown(samples[labels == c]), minlength=4) / 1000
            torch.testing.assert_close(frequencies, torch.tensor(wanted), rtol=0, atol=0.04)


def test_the_weight_of_a_sample_is_the_sum_of_its_multipliers():
    trained = make()
    latents = fresh_latents(3, 10, 2, CLASSES)
    with torch.no_grad():
        trained.module.multiplier.weight.normal_()
        h = trained.module(latents)[1]
    weights = trained.draw(latents, trained.members[0])[1]
    for i, label in enumerate(latents.labels.tolist()):
        others = [j for j in range(CLASSES) if j != label]
        assert float(weights[i]) == pytest.approx(float(F.softplus(h[i, others]).sum()), rel=1e-5)


def test_free_images_keep_their_class_and_come_up_by_their_multipliers(subtests):
    for count, wanted in product([12, 14], [5, 12, 14, 40]):
        with subtests.test(f"{count=} {wanted=}"):
            trained = make_free(count)
            for drawing in DRAWINGS:
                samples, labels = trained.sample(wanted, 0, drawing)
                assert torch.equal(shown(samples) % CLASSES, labels)
            plain = shown(trained.sample(wanted, 0, "plain")[0])
            assert plain[:count].tolist() == list(range(min(count, wanted)))
            # images are drawn floor or ceiling of their expectation: none counts twice where more are asked for than there are
            samples, labels = trained.sample(400 * CLASSES, 0)
            totals = 2 * F.softplus(torch.arange(count).float())
            for c in range(CLASSES):
                expected = 400 * totals[c::CLASSES] / totals[c::CLASSES].sum()
                numbers = torch.bincount(shown(samples[labels == c]), minlength=count)[c::CLASSES]
                assert float((numbers - expected).abs().max()) <= 1


def test_free_images_need_one_per_class():
    with pytest.raises(UserError, match="global_batch=2 is too small for generator=free"):
        make_free(2)


@pytest.fixture(params=["float32", "bfloat16"])
def config(request, bundle_dir, tmp_path) -> TrainConfig:
    settings = {"steps": 3, "global_batch": 9, "device": "cpu", "alpha": AlphaConfig(init=-3.0)}
    log = LogConfig(every=1, progress=False)
    return TrainConfig(str(bundle_dir), str(tmp_path / "run"), dtype=request.param, log=log, **settings)


def test_a_run_is_read_without_its_classifier(config, bundle_dir, tmp_path):
    train(config)
    shutil.rmtree(bundle_dir)
    run = load_run(tmp_path / "run")
    assert run.config.steps == 3
    assert run.step == 3
    samples, labels = run.generator.sample(10, 0)
    assert labels.tolist() == [i % 3 for i in range(10)]
    assert run.generator.classes == ["a", "b", "c"]
    assert float(samples.min()) >= -1e-6
    assert float(samples.max()) <= 1 + 1e-6
    state = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig()).latest().state
    assert run.alphas == state["scale"]["alpha"]
    for name, weights in run.generator.module.state_dict().items():
        assert torch.equal(weights, state["engine"]["weights"][name].float())
    assert not any(p.requires_grad for p in run.generator.module.parameters())


def test_a_run_is_bound_to_its_classifier_wherever_that_lies(config, bundle, bundle_dir, tmp_path):
    train(config)
    bundle_dir.rename(tmp_path / "moved")
    assert train(replace(config, classifier=str(tmp_path / "moved"))).steps_made == 0
    with torch.no_grad():
        next(bundle.model.parameters())[0, 0] += 1e-3
    save_bundle(bundle, tmp_path / "other")
    with pytest.raises(UserError, match="holds a run of another classifier than classifier="):
        train(replace(config, classifier=str(tmp_path / "other")))


def test_a_run_without_a_checkpoint_is_named(config):
    with RunDirectory(config), pytest.raises(UserError, match="has no checkpoint yet"):
        load_run(config.run_dir)


def test_what_a_checkpoint_keeps_gives_the_normalization_back():
    trained = make()
    (member,) = members_from(trained.state_dict())
    again = member.normalization
    for name in ("mean", "scale", "lower", "upper"):
        assert torch.equal(getattr(again, name), getattr(NORMALIZATION, name))
    assert member.classes == ["a", "b", "c"]


def test_the_picture_has_a_row_of_all_classes_at_latents_that_stay():
    trained = make()
    images, columns = trained.picture(seed=4, rows=5)
    assert columns == CLASSES
    assert images.shape == (15, *SHAPE)
    assert torch.equal(images, trained.picture(seed=4, rows=5)[0])
    assert torch.equal(images, trained.draw(fresh_latents(4, 15, 2, CLASSES), trained.members[0])[0])
