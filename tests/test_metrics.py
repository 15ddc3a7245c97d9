"""The metrics against slow explicit loops, and on the digits, whose values are known."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.dataset import Dataset, Split
from hpc_c2g.data.load import load_split
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation import comparison, metrics, oracle
from hpc_c2g.evaluation import ssim as similarity
from hpc_c2g.evaluation.comparison import svc_accuracy
from hpc_c2g.evaluation.metrics import halves, judge, nearest_pairs, noise_samples, real_baseline
from hpc_c2g.evaluation.oracle import Oracle

SSIM = ("ssim_sample_to_train", "ssim_train_to_sample")


def random_set(count: int, seed: int, shape: tuple[int, ...] = (1, 8, 8), classes: int = 3) -> Dataset:
    """Noisy copies of one random prototype per class, labels 0, 1, 2, 0, .."""
    rng = torch.Generator().manual_seed(seed)
    prototypes = torch.rand(classes, *shape, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    samples = (prototypes[labels] + 0.3 * torch.randn(count, *shape, generator=rng)).clamp(0, 1)
    return Dataset(samples, labels, [str(c) for c in range(classes)], (0.0, 1.0))


def small_split(**fields: Any) -> Split:
    return Split(random_set(13, 0, **fields), random_set(41, 1, **fields))


def distance(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)))


def to_nearest(a: Tensor, others: Tensor) -> float:
    return min(distance(a, b) for b in others)


def pair_distances(data: Dataset) -> list[float]:
    return [
        distance(data.samples[i], data.samples[j])
        for i in range(len(data))
        for j in range(i)
        if data.labels[i] == data.labels[j]
    ]


def by_class(data: Dataset) -> Tensor:
    return torch.cat([data.samples[data.labels == c] for c in range(len(data.classes))])


def ssim(a: np.ndarray, b: np.ndarray, sigma: float, radius: int) -> float:
    """Wang et al. 2004, equation 13, for one channel of values in 0..1, mirrored at the border."""
    offsets = range(-radius, radius + 1)
    weights = {(i, j): math.exp(-(i * i + j * j) / (2 * sigma**2)) for i in offsets for j in offsets}
    total = sum(weights.values())
    height, width = a.shape

    def mirror(i: int, size: int) -> int:
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    values = []
    for y in range(height):
        for x in range(width):
            window = [(mirror(y + i, height), mirror(x + j, width), w / total) for (i, j), w in weights.items()]
            mean_a, mean_b = sum(w * a[i, j] for i, j, w in window), sum(w * b[i, j] for i, j, w in window)
            var_a = sum(w * (a[i, j] - mean_a) ** 2 for i, j, w in window)
            var_b = sum(w * (b[i, j] - mean_b) ** 2 for i, j, w in window)
            cov = sum(w * (a[i, j] - mean_a) * (b[i, j] - mean_b) for i, j, w in window)
            top = (2 * mean_a * mean_b + 0.01**2) * (2 * cov + 0.03**2)
            values.append(top / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
    return float(np.mean(values))


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_split(DataConfig(train_size=100))


class TestAgainstLoops:
    @pytest.mark.parametrize("block", [4, 1024])
    def test_distances(self, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(comparison, "BLOCK", block)
        split, generated = small_split(), random_set(20, 2)
        train, held = split.train, split.held_out
        result = judge(generated.samples, generated.labels, split)
        generated_median = statistics.median(to_nearest(x, train.samples) for x in generated.samples)
        held_median = statistics.median(to_nearest(x, train.samples) for x in held.samples)
        assert result["proximity"] == pytest.approx(generated_median / held_median, rel=1e-6)
        covered = [to_nearest(x, generated.samples) < to_nearest(x, held.samples) for x in train.samples]
        assert result["coverage"] == pytest.approx(sum(covered) / len(covered))
        assert 0 < sum(covered) < len(covered), "the case would tell nothing"
        diversity = statistics.median(pair_distances(generated)) / statistics.median(pair_distances(held))
        assert result["diversity"] == pytest.approx(diversity, rel=1e-6)
        nearest = [min(range(20), key=lambda i: distance(x, generated.samples[i])) for x in train.samples]
        assert nearest_pairs(generated.samples, train.samples).tolist() == nearest

    def test_ssim(self) -> None:
        split, generated = small_split(), random_set(12, 2)
        train = split.train.samples
        result = judge(generated.samples, generated.labels, split)
        for key, queries, references in ((SSIM[0], generated.samples, train), (SSIM[1], train, generated.samples)):
            best = []
            for x in queries:
                order = sorted(range(len(references)), key=lambda i: distance(x, references[i]))
                best.append(max(ssim(x[0].numpy(), references[i, 0].numpy(), 0.5, 2) for i in order[:5]))
            assert result[key]["mean"] == pytest.approx(np.mean(best), abs=1e-5)
            assert result[key]["best10"] == pytest.approx(np.mean(sorted(best)[-10:]), abs=1e-5)

    def test_classifiers_see_only_their_half(self, monkeypatch: pytest.MonkeyPatch) -> None:
        split, generated = small_split(), random_set(20, 2)
        first, second = (half.samples for half in halves(split.held_out, seed=3))
        seen: list[tuple[Tensor, Tensor]] = []

        def oracle_of(data: Dataset, seed: int = 0) -> Oracle:
            return lambda samples: seen.append((data.samples, samples)) or torch.zeros(len(samples))

        monkeypatch.setattr(metrics, "oracle_of", oracle_of)
        monkeypatch.setattr(comparison, "svc_oracle", oracle_of)
        judge(generated.samples, generated.labels, split, seed=3)
        real_baseline(split, seed=3)
        expected = [
            (first, generated.samples),
            (by_class(generated), second),
            (first, second),
            (by_class(halves(split.held_out, seed=3)[1]), first),
        ]
        for (fit, test), (fit_expected, test_expected) in zip(seen, expected, strict=True):
            assert torch.equal(fit, fit_expected)
            assert torch.equal(test, test_expected)

    def test_svc_accuracy_counts_agreement(self) -> None:
        fit, test = random_set(30, 1), random_set(12, 2)
        assert svc_accuracy(fit, test) == 1
        wrong = test.labels.clone()
        wrong[:3] = (wrong[:3] + 1) % 3
        assert svc_accuracy(fit, Dataset(test.samples, wrong, test.classes, test.value_range)) == 9 / 12


class TestLaws:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_halves_are_disjoint_stratified_and_complete(self, seed: int) -> None:
        held = small_split().held_out
        first, second = halves(held, seed)
        parts = [{x.numpy().tobytes() for x in part.samples} for part in (first, second)]
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] == {x.numpy().tobytes() for x in held.samples}
        assert all(0 <= n - m <= 1 for n, m in zip(first.labels.bincount(), second.labels.bincount(), strict=True))

    def test_the_training_images_are_perfect_copies(self) -> None:
        split = small_split()
        result = judge(split.train.samples, split.train.labels, split)
        assert (result["proximity"], result["coverage"]) == (0.0, 1.0)
        assert all(result[key]["mean"] == pytest.approx(1, abs=1e-5) for key in SSIM)

    def test_the_real_baseline_compares_one_half_with_the_other(self) -> None:
        split = small_split()
        first, second = halves(split.held_out, 0)
        expected = judge(second.samples, second.labels, Split(split.train, first))
        result = real_baseline(split)
        for key in ("proximity", "coverage", "diversity", *SSIM):
            assert result[key] == expected[key]

    def test_the_order_of_the_samples_does_not_matter(self) -> None:
        split, generated = small_split(), random_set(20, 2)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        one = judge(generated.samples, generated.labels, split)
        two = judge(generated.samples[order], generated.labels[order], split)
        for key, value in one.items():
            assert two[key] == pytest.approx(value, abs=1e-6)

    def test_equal_seeds_give_equal_values_that_json_can_hold(self) -> None:
        split, generated = small_split(), random_set(20, 2)
        one, two = (judge(generated.samples.clone().requires_grad_(), generated.labels, split, seed=5) for _ in "ab")
        assert json.loads(json.dumps(one, allow_nan=False)) == two

    def test_one_image_repeated_has_no_diversity(self) -> None:
        split = small_split()
        result = judge(split.train.samples[:1].expand(9, -1, -1, -1), torch.arange(9) % 3, split)
        assert result["diversity"] == 0.0
        assert result["coverage"] <= 2 / 13

    def test_samples_of_one_class_or_too_few_are_still_judged(self) -> None:
        split = small_split()
        result = judge(split.train.samples[:1], torch.tensor([0]), split)
        assert result["diversity"] is None
        assert result["transfer_accuracy"] == pytest.approx(1 / 3, abs=0.1)

    def test_only_images_have_ssim(self) -> None:
        split = small_split(shape=(5,))
        result = judge(split.train.samples, split.train.labels, split)
        assert [result[key] for key in SSIM] == [None, None]
        assert result["proximity"] == 0

    def test_transfer_takes_the_first_samples_of_every_class(self, monkeypatch: pytest.MonkeyPatch) -> None:
        split, generated = small_split(), random_set(30, 2)
        full = judge(generated.samples[:9], generated.labels[:9], split)["transfer_accuracy"]
        spoiled = generated.labels.clone()
        spoiled[9:] = (spoiled[9:] + 1) % 3
        monkeypatch.setattr(comparison, "TRANSFER_SAMPLES", 9)
        order = torch.cat([torch.arange(9), 9 + torch.randperm(21, generator=torch.Generator().manual_seed(0))])
        assert judge(generated.samples[order], spoiled[order], split)["transfer_accuracy"] == full

    def test_bounded_subsamples_come_near_the_whole(self, digits: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        full = real_baseline(digits)
        monkeypatch.setattr(oracle, "POINTS", 400)
        monkeypatch.setattr(comparison, "PAIR_SAMPLES", 40)
        monkeypatch.setattr(similarity, "SSIM_QUERIES", 60)
        bounded = real_baseline(digits)
        assert bounded != full
        for key in ("oracle_accuracy", "diversity"):
            assert bounded[key] == pytest.approx(full[key], abs=0.05)
        assert bounded[SSIM[0]]["mean"] == pytest.approx(full[SSIM[0]]["mean"], abs=0.05)

    def test_noise_fills_its_range_with_balanced_labels(self) -> None:
        samples, labels = noise_samples(1000, (2, 3), (-2.0, 4.0), 7, seed=1)
        assert samples.shape == (1000, 2, 3)
        assert -2 <= float(samples.min()) < -1.9
        assert 3.9 < float(samples.max()) <= 4
        assert set(labels.bincount().tolist()) == {142, 143}
        assert torch.equal(samples, noise_samples(1000, (2, 3), (-2.0, 4.0), 7, seed=1)[0])


class TestDigits:
    def test_real_images_are_the_ceiling(self, digits: Split) -> None:
        result = real_baseline(digits)
        assert result["oracle_accuracy"] > 0.97
        assert result["transfer_accuracy"] > 0.97
        assert result["proximity"] == pytest.approx(1, abs=0.05)
        assert result["diversity"] == pytest.approx(1, abs=0.05)
        assert result["coverage"] == pytest.approx(0.5, abs=0.15)

    def test_training_images_teach_what_a_hundred_images_can(self, digits: Split) -> None:
        result = judge(digits.train.samples, digits.train.labels, digits)
        assert (result["proximity"], result["coverage"]) == (0.0, 1.0)
        assert result["oracle_accuracy"] > 0.95
        assert 0.85 < result["transfer_accuracy"] < 0.96

    def test_noise_is_the_floor(self, digits: Split) -> None:
        result = judge(*noise_samples(500, (1, 8, 8), (0.0, 1.0), 10), digits)
        assert result["oracle_accuracy"] == pytest.approx(0.1, abs=0.06)
        assert result["transfer_accuracy"] < 0.3
        assert result["coverage"] == 0
        assert result["proximity"] > 2


@pytest.mark.parametrize(
    ("samples", "labels", "told"),
    [
        (torch.rand(4, 1, 7, 8), torch.zeros(4, dtype=torch.long), r"do not match data of shape \[1, 8, 8\]"),
        (torch.rand(4, 1, 8, 8), torch.zeros(3, dtype=torch.long), r"labels \[3\] do not match"),
        (torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.long), "at least one sample"),
        (torch.full((4, 1, 8, 8), math.nan), torch.zeros(4, dtype=torch.long), "4 of 4 samples .* not finite"),
        (torch.rand(4, 1, 8, 8), torch.full((4,), 3), "give integers in 0..2"),
        (torch.rand(4, 1, 8, 8), torch.zeros(4), "give integers in 0..2"),
    ],
)
def test_what_cannot_be_judged_is_refused(samples: Tensor, labels: Tensor, told: str) -> None:
    with pytest.raises(UserError, match=told):
        judge(samples, labels, small_split())


def test_too_little_held_out_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.held_out_size"):
        real_baseline(Split(random_set(13, 0), random_set(4, 1)))
