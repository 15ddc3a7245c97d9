"""Laws of the duality: slow loops, micro-batches that add up, the U of feasibility and slackness, neutral multipliers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpc_c2g.fitting.fit import smoothed_margin
from hpc_c2g.kkt import duality
from hpc_c2g.kkt.margins import other_classes, pairwise_margins, smallest_margins


def samples(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Margins, multiplier logits and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits, h = (torch.randn(count, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(classes, (count,), generator=generator)
    return pairwise_margins(2 * logits, labels), h, labels


SAMPLES = st.builds(samples, st.integers(1, 9), st.integers(2, 5), st.integers(0, 10_000))
quick = settings(deadline=None, max_examples=30)


def loop(margins: Tensor, labels: Tensor):
    """(i, j, m_ij) of every pair j != y_i as Python numbers."""
    rows = margins.tolist()
    return [(i, j, m) for i, row in enumerate(rows) for j, m in enumerate(row) if j != int(labels[i])]


@quick
@given(st.integers(1, 9), st.integers(2, 5), st.integers(0, 10_000))
def test_margins_are_differences_to_the_label(count, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=generator)
    margins, smallest = pairwise_margins(logits, labels), smallest_margins(pairwise_margins(logits, labels), labels)
    for i, y in enumerate(labels.tolist()):
        others = []
        for j in range(classes):
            assert float(margins[i, j]) == float(logits[i, y]) - float(logits[i, j])
            assert bool(other_classes(labels, classes)[i, j]) == (j != y)
            others += [float(margins[i, j])] if j != y else []
        assert float(smallest[i]) == min(others)


@quick
@given(SAMPLES, st.floats(0.1, 1e4), st.integers(1, 50))
def test_multipliers_are_softplus_over_the_other_classes(data, scale, batch):
    _, h, labels = data
    mu = duality.multipliers_from(h, labels, scale, batch)
    for i in range(len(h)):
        for j in range(h.shape[1]):
            expected = 0 if j == labels[i] else scale / batch * math.log1p(math.exp(h[i, j]))
            assert float(mu[i, j]) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_neutral_multipliers_sum_to_the_scale(classes):
    labels = torch.arange(20) % classes
    h = torch.full((20, classes), duality.neutral_logit(classes), dtype=torch.float64)
    assert float((F.softplus(h[0]) * (torch.arange(classes) != labels[0])).sum()) == pytest.approx(1, rel=1e-12)
    assert float(duality.multipliers_from(h, labels, 7.0, 20).sum()) == pytest.approx(7, rel=1e-12)


@quick
@given(SAMPLES, st.floats(-2, 2))
def test_feasibility_and_slackness_are_their_loops(data, alpha):
    margins, h, labels = data
    ea, count = math.exp(alpha), len(labels)
    smallest = [min(ea * m for i, _, m in loop(margins, labels) if i == sample) for sample in range(count)]
    expected = sum(max(0.0, 1 - s) ** 2 for s in smallest) / count
    assert float(duality.feasibility(margins, labels, alpha, count)) == pytest.approx(expected, rel=1e-10, abs=1e-15)
    mu = duality.multipliers_from(h, labels, 3.0, count)
    expected = sum(float(mu[i, j]) * max(0.0, ea * m - 1) for i, j, m in loop(margins, labels)) / 3.0
    assert float(duality.slackness(margins, mu, alpha, 3.0)) == pytest.approx(expected, rel=1e-10, abs=1e-15)
    weighted, total = duality.weighted_margin_sums(margins, mu)
    pairs = [(float(mu[i, j]), m) for i, j, m in loop(margins, labels)]
    assert float(weighted) == pytest.approx(sum(u * m for u, m in pairs), rel=1e-10, abs=1e-10)
    assert float(total) == pytest.approx(sum(u for u, _ in pairs), rel=1e-12)


@quick
@given(SAMPLES, st.data())
def test_micro_batches_add_up_to_the_batch(data, draw):
    margins, h, labels = data
    batch = len(labels)
    cut = draw.draw(st.integers(0, batch))

    def terms(part: slice) -> Tensor:
        m, y = margins[part], labels[part]
        mu = duality.multipliers_from(h[part], y, 3.0, batch)
        sums = duality.weighted_margin_sums(m, mu)
        return torch.stack([duality.feasibility(m, y, 0.3, batch), duality.slackness(m, mu, 0.3, 3.0), *sums])

    whole, parts = terms(slice(None)), terms(slice(cut)) + terms(slice(cut, None))
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-13)


def test_the_two_conditions_form_a_u_around_a_scaled_margin_of_one():
    labels, alpha = torch.tensor([0]), math.log(2.0)

    def total(scaled_margin: float) -> float:
        margins = torch.tensor([[0.0, scaled_margin / 2]], dtype=torch.float64)
        mu = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        return float(duality.feasibility(margins, labels, alpha, 1) + duality.slackness(margins, mu, alpha, 1.0))

    assert total(1.0) == pytest.approx(0, abs=1e-15)
    assert [total(s) for s in (-1, 0, 0.5)] == pytest.approx([4, 1, 0.25])
    assert [total(s) for s in (1.5, 3)] == pytest.approx([0.5, 2])


@quick
@given(SAMPLES)
def test_smoothed_margin_is_its_loop_and_bounds_the_smallest_margin(data):
    logits, labels = data[1], data[2]
    margins = [m for _, _, m in loop(pairwise_margins(logits, labels), labels)]
    got = float(smoothed_margin(logits, labels))
    assert got == pytest.approx(math.log(sum(math.exp(-m) for m in margins)), rel=1e-9, abs=1e-9)
    assert -min(margins) - 1e-9 <= got <= -min(margins) + math.log(len(margins)) + 1e-9


def test_gradients_of_multipliers_at_the_label_are_zero():
    h = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 1, 2, 1])
    (gradient,) = torch.autograd.grad(duality.multipliers_from(h, labels, 2.0, 4).sum(), h)
    expected = 0.5 * torch.sigmoid(h.detach()) * (F.one_hot(labels, 3) == 0)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=0)
