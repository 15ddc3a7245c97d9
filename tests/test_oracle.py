"""Laws of the oracle: a net for images that a support vector machine reads badly, a function of its data and seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_c2g.data.dataset import Dataset
from hpc_c2g.evaluation import oracle
from hpc_c2g.evaluation.oracle import moved, net_oracle, oracle_of

CLASSES = ["horizontal", "vertical", "crossed"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "STEPS", 12)


def bars(count: int, seed: int, side: int = 24) -> Dataset:
    """Bars anywhere, as bright as the noise around them on the whole: no single pixel tells the class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = 0.5 * torch.rand(count, 1, side, side, generator=draw)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = torch.randint(2, side - 2, (2,), generator=draw).tolist()
        if label != 1:
            image[0, row] += 0.5
        if label != 0:
            image[0, :, column] += 0.5
    return Dataset(images, labels, CLASSES, (0.0, 1.0))


def accuracy(read: oracle.Oracle, data: Dataset) -> float:
    return float((read(data.samples) == data.labels).double().mean())


def test_the_net_reads_what_it_never_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "STEPS", 80)
    test = bars(90, 1)
    assert accuracy(net_oracle(bars(600, 0), seed=0), test) > 0.95


@pytest.mark.parametrize(("side", "kind"), [(23, "svc_oracle"), (24, "net_oracle")])
def test_a_net_reads_larger_images_a_machine_the_rest(side: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("svc_oracle", "net_oracle"):
        monkeypatch.setattr(oracle, name, lambda *_, name=name: asked.append(name))
    oracle_of(bars(6, 0, side), seed=0)
    assert asked == [kind]


def test_the_net_is_a_function_of_its_seed_and_leaves_the_global_generator() -> None:
    data, test = bars(60, 0), bars(300, 1)
    before = torch.random.get_rng_state()
    answers = [net_oracle(data, seed)(test.samples) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_units_do_not_matter() -> None:
    data, test = bars(60, 0), bars(60, 1)
    other = Dataset(255 * data.samples - 100, data.labels, CLASSES, (-100.0, 155.0))
    assert (
        float((net_oracle(data, 0)(test.samples) == net_oracle(other, 0)(255 * test.samples - 100)).double().mean())
        > 0.95
    )


def test_a_last_batch_of_one_is_left_out() -> None:
    net_oracle(bars(oracle.BATCH + 1, 0), seed=0)


def test_one_class_is_always_that_class() -> None:
    only = Dataset(torch.rand(4, 1, 8, 8), torch.full((4,), 2), CLASSES, (0.0, 1.0))
    assert oracle_of(only, 0)(torch.rand(3, 1, 8, 8)).tolist() == [2, 2, 2]


def test_images_move_by_whole_pixels_both_ways() -> None:
    point = torch.zeros(2000, 1, 9, 9)
    point[:, :, 4, 4] = 1
    after = moved(point)
    assert torch.equal(after.sum((1, 2, 3)), torch.ones(2000))
    places: Tensor = after[:, 0].sum(0).nonzero()
    assert places.amin(0).tolist() == [4 - oracle.SHIFT] * 2
    assert places.amax(0).tolist() == [4 + oracle.SHIFT] * 2
    assert len(places) == (2 * oracle.SHIFT + 1) ** 2
