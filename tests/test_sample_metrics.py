"""Laws of what is logged of samples: each statistic against a slow reference, and at the ends of its scale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_c2g.monitoring.sample_metrics import (
    class_mass,
    diversity,
    quantiles,
    roughness,
    sample_metrics,
    saturation,
    unsupported,
)

GENERATOR = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return GENERATOR.random(shape)


def test_diversity_is_the_share_of_variance_within_classes():
    x, labels = random(60, 1, 3, 3), np.arange(60) % 4
    flat = x.reshape(60, -1)
    within = sum(((flat[labels == c] - flat[labels == c].mean(0)) ** 2).sum() for c in range(4)) / (60 - 4)
    total = ((flat - flat.mean(0)) ** 2).sum() / 59
    assert float(diversity(x, labels)) == pytest.approx(min(1, np.sqrt(within / total)))


def test_diversity_is_0_where_a_class_is_one_image_and_1_where_labels_say_nothing():
    labels = np.arange(4000) % 4
    assert float(diversity(random(4, 1, 3, 3)[labels], labels)) < 1e-12
    assert float(diversity(random(4000, 1, 3, 3), labels)) == pytest.approx(1, abs=0.01)
    assert float(diversity(np.ones((8, 1, 3, 3)), np.arange(8) % 2)) == 0


@pytest.mark.parametrize("count", [1, 3])
def test_diversity_of_one_sample_per_class_is_unknown_and_0(count):
    assert float(diversity(random(count, 1, 3, 3), np.arange(count))) == 0


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10), st.floats(-5, 5))
def test_statistics_of_spread_do_not_depend_on_unit_and_origin(factor, shift):
    x, labels = random(20, 2, 4, 5), np.arange(20) % 3
    assert float(diversity(factor * x + shift, labels)) == pytest.approx(float(diversity(x, labels)), rel=1e-6)
    assert float(roughness(factor * x + shift)) == pytest.approx(float(roughness(x)), rel=1e-6)


def test_roughness_is_1_for_noise_2_for_a_checkerboard_and_near_0_for_a_slope():
    noise = GENERATOR.normal(size=(50, 1, 32, 32))
    checkers = ((np.arange(32)[:, None] + np.arange(32)) % 2.0)[None, None]
    slope = np.broadcast_to(np.linspace(0, 1, 32), (1, 1, 32, 32))
    assert float(roughness(noise)) == pytest.approx(1, abs=0.03)
    assert float(roughness(checkers)) == pytest.approx(2)
    assert float(roughness(slope)) < 0.05
    assert float(roughness(np.ones((2, 1, 4, 4)))) == 0


def test_roughness_is_one_less_the_correlation_of_neighbors():
    x = random(1, 1, 6, 7)
    image = (x - x.mean())[0, 0]
    pairs = [(image[1:].ravel(), image[:-1].ravel()), (image[:, 1:].ravel(), image[:, :-1].ravel())]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    assert float(roughness(x)) == pytest.approx(1 - 2 * (a * b).sum() / ((a**2).sum() + (b**2).sum()))


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 1, 1, 5), (3, 3, 5, 1)])
def test_an_image_one_pixel_wide_has_a_roughness(shape):
    assert 0 <= float(roughness(random(*shape))) <= 4


def test_saturation_counts_values_at_the_ends_of_the_box_and_beyond():
    x = np.array([-0.5, 0.0, 0.005, 0.02, 0.5, 0.98, 0.995, 1.0, 1.2, 0.3])
    assert float(saturation(x)) == pytest.approx(0.6)


def test_unsupported_are_samples_off_the_band_or_without_multipliers():
    margins = np.array([1.0, 0.51, 1.99, 0.49, 2.01, 1.0, 1.0, 3.0])
    multipliers = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.03, 0.0])
    assert float(unsupported(margins, multipliers)) == pytest.approx(5 / 8)  # two off, two without, one both


def test_class_mass_is_1_where_a_kkt_point_shares_evenly_and_sums_to_c():
    labels = np.arange(12) % 3
    assert class_mass(np.ones(12), labels, 3).tolist() == pytest.approx([1, 1, 1])
    weights = random(12)
    mass = class_mass(weights, labels, 3)
    assert float(mass.sum()) == pytest.approx(3 * float(weights.mean()))
    assert class_mass(np.where(labels == 1, 0.0, 1.0), labels, 3)[1] == 0


def test_quantiles_and_the_share_of_zeros_are_those_of_the_values():
    margins = GENERATOR.normal(size=501)
    multipliers = np.concatenate([np.zeros(301), GENERATOR.random(701) + 0.1]).reshape(501, 2)
    told = sample_metrics(margins, multipliers, np.arange(501) % 3, random(501, 1, 2, 2), 3)
    for name, values in (("margins", margins), ("multipliers", multipliers)):
        for q in (5, 25, 50, 75, 95):
            assert told[f"{name}/q{q:02d}"] == pytest.approx(float(np.quantile(values, q / 100)), abs=1e-6)
    assert told["multipliers/share_of_zeros"] == pytest.approx(301 / 1002)


def test_quantiles_of_many_values_are_those_of_an_even_sample():
    told = quantiles("margins", np.linspace(0, 1, 20_000_000))
    assert told["margins/q05"] == pytest.approx(0.05, abs=1e-4)
    assert told["margins/q95"] == pytest.approx(0.95, abs=1e-4)


def test_samples_that_are_no_images_have_no_roughness():
    told = sample_metrics(np.ones(4), np.ones((4, 1)), np.arange(4) % 2, random(4, 7), 2)
    assert "diversity" in told
    assert not {"roughness", "saturation"} & told.keys()
