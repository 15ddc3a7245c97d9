"""Laws of the latents: a function of (seed, step, index) alone, even over the codes, standard normal marginals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hpc_c2g.generators.config import SCHEMES
from hpc_c2g.generators.latents import Latents, LatentSampler, counted_uniforms, fresh_latents, normal_quantiles

quick = settings(deadline=None, max_examples=40)


def same(a: Latents, b: Latents) -> bool:
    return torch.equal(a.z, b.z) and torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)


def part(latents: Latents, start: int, stop: int) -> Latents:
    return latents[start:stop]


@quick
@given(
    st.data(), st.sampled_from(SCHEMES), st.integers(1, 9), st.integers(2, 4), st.integers(1, 25), st.integers(0, 99)
)
def test_a_sample_is_the_same_in_whatever_slice_it_is_drawn(data, scheme, dimensions, classes, batch, seed):
    start = data.draw(st.integers(0, batch))
    stop, step = data.draw(st.integers(start, batch)), data.draw(st.integers(1, 10))
    whole = LatentSampler(dimensions, classes, batch, seed, scheme=scheme).batch(step, 0, batch)
    other = LatentSampler(dimensions, classes, batch, seed, scheme=scheme)  # another process
    other.batch(3, 0, batch)  # that drew something else before
    assert whole.z.shape == (batch, dimensions)
    assert whole.z.dtype == torch.float64
    assert same(other.batch(step, start, stop), part(whole, start, stop))


@quick
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 50), st.integers(1, 20), st.integers(1, 9))
def test_uniforms_are_counted(seed, step, start, count, dimensions):
    rows = counted_uniforms(seed, step, start, start + count, dimensions)
    assert rows.shape == (count, dimensions)
    assert rows.min() >= 0
    assert rows.max() < 1
    for i in range(count):
        alone = counted_uniforms(seed, step, start + i, start + i + 1, dimensions)
        assert np.array_equal(alone[0], rows[i])
    assert len(np.unique(rows)) == rows.size  # neighbors share no numbers


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_step_returns_to_latents_of_another(scheme):
    sampler = LatentSampler(2, 3, 12, 0, scheme=scheme)
    drawn = [sampler.batch(step, 0, 12).z for step in range(1, 11)]
    for i in range(10):
        assert not any(bool((drawn[i] == z).any()) for z in drawn[:i])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_step_and_every_seed_is_new(scheme):
    first, second = (LatentSampler(2, 3, 12, seed, scheme=scheme) for seed in (0, 1))
    drawn = [first.batch(1, 0, 12).z, first.batch(2, 0, 12).z, second.batch(1, 0, 12).z]
    assert not bool((drawn[0] == drawn[1]).any() or (drawn[0] == drawn[2]).any())


@quick
@given(
    st.integers(1, 6), st.integers(1, 5), st.integers(2, 4), st.integers(1, 3), st.integers(0, 99), st.integers(1, 99)
)
def test_stratified_meets_every_code_equally_often(codes, times, classes, dimensions, seed, step):
    batch = codes * times * classes
    latents = LatentSampler(dimensions, classes, batch, seed, scheme="stratified").batch(step, 0, batch)
    met = np.floor(stats.norm.cdf(latents.z[:, 0].numpy()) * codes).astype(int)
    for label in range(classes):
        assert np.bincount(met[latents.labels.numpy() == label], minlength=codes).tolist() == [times] * codes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_marginals_are_standard_normal_and_uncorrelated(scheme):
    sampler = LatentSampler(3, 4, 512, 1, scheme=scheme)
    z = torch.cat([sampler.batch(step, 0, 512).z for step in range(1, 5)]).numpy()
    for coordinate in z.T:
        assert stats.kstest(coordinate, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(z.T) - np.eye(3)).max() < 0.1


@pytest.mark.parametrize("scheme", ["sobol", "stratified"])
def test_low_discrepancy_schemes_fill_every_class_more_evenly_than_chance(scheme):
    latents = LatentSampler(2, 3, 3 * 64, 2, scheme=scheme).batch(5, 0, 3 * 64)
    for label in range(3):
        for coordinate in latents.z[latents.labels == label].numpy().T:
            assert stats.kstest(coordinate, "norm").statistic <= 2 / 64


@pytest.mark.parametrize("scheme", SCHEMES)
def test_classes_have_points_of_their_own(scheme):
    z = LatentSampler(2, 3, 30, 0, scheme=scheme).batch(1, 0, 30).z
    assert not bool((z[0::3] == z[1::3]).any() or (z[1::3] == z[2::3]).any())


@quick
@given(st.sampled_from(SCHEMES), st.integers(2, 5), st.integers(1, 30))
def test_labels_cycle_through_the_classes(scheme, classes, batch):
    latents = LatentSampler(2, classes, batch, 0, scheme=scheme).batch(1, 0, batch)
    assert latents.index.tolist() == list(range(batch))
    assert latents.labels.tolist() == [i % classes for i in range(batch)]


def test_latents_are_finite_at_the_ends_of_the_unit_interval():
    z = normal_quantiles(np.array([0.0, 0.5, np.nextafter(1.0, 0.0)]))
    assert bool(torch.isfinite(z).all())
    assert float(z[0]) < -8
    assert float(z[1]) == 0
    assert float(z[2]) > 8


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    LatentSampler(2, 3, 12, 0, scheme="sobol").batch(1, 0, 12)
    fresh_latents(0, 5, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_fresh_latents_are_normal_cycle_and_differ_from_those_of_training():
    fresh = fresh_latents(0, 2000, 2, 3)
    assert fresh.labels.tolist() == [i % 3 for i in range(2000)]
    assert fresh.index.tolist() == list(range(2000))
    for coordinate in fresh.z.numpy().T:
        assert stats.kstest(coordinate, "norm").pvalue > 1e-3
    sampler = LatentSampler(2, 3, 2000, 0, scheme="normal")
    for step in (1, 2, 3):
        assert not bool((sampler.batch(step, 0, 2000).z == fresh.z).any())


@quick
@given(st.integers(0, 99), st.integers(0, 30), st.integers(1, 20), st.integers(1, 6))
def test_fresh_latents_can_be_drawn_in_pieces(seed, start, count, dimensions):
    whole = fresh_latents(seed, start + count, dimensions, 3)
    assert same(fresh_latents(seed, count, dimensions, 3, start), part(whole, start, start + count))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="scheme='halton'"):
        LatentSampler(2, 3, 12, 0, scheme="halton")
