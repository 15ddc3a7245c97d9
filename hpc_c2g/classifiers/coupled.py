"""Inner products of margin gradients where batch statistics couple the samples: every margin depends on every sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpc_c2g.kkt.margins import other_classes, pairwise_margins
from hpc_c2g.kkt.stationarity import Classifier


def coupled_gram(
    phi: Classifier, theta: Mapping[str, Tensor], scales: Mapping[str, float], x: Tensor, y: Tensor, memory: int
) -> Tensor:
    """J J^T: sum_k s_k^2 <grad_k m_ij, grad_k m_i'j'> over all j != y_i, ``[M, M]``, rows ordered by i, then j.

    A backward pass through the whole batch per margin; block of rows by block of rows, the second block of each pair anew where not all
    fit.

    Args:
        phi: the classifier, with the statistics of the batch that it is called on.
        theta: its parameters.
        scales: s_k = e^(a (1 - lambda_k)) per parameter.
        x: the whole batch ``[n, *S]``.
        y: labels ``[n]``.
        memory: bytes for the row gradients (at least one row is held).
    """
    leaves = {k: t.detach().requires_grad_() for k, t in theta.items()}
    with torch.enable_grad():
        margins = pairwise_margins(phi(leaves, x), y)
        rows = margins[other_classes(y, margins.shape[1])].unbind()

    def block(span: slice) -> Tensor:
        gradients = []
        for row in rows[span]:
            parts = torch.autograd.grad(row, list(leaves.values()), retain_graph=True, materialize_grads=True)
            gradients.append(torch.cat([scales[k] * g.flatten() for k, g in zip(leaves, parts, strict=True)]))
        return torch.stack(gradients)

    # a quarter: two blocks, and the rows of the second before and after they are stacked
    size = max(1, memory // (4 * x.element_size() * sum(t.numel() for t in leaves.values())))
    spans = [slice(i, i + size) for i in range(0, len(rows), size)]
    gram = torch.zeros(len(rows), len(rows)).to(x)
    for i, one in enumerate(spans):
        first = block(one)
        gram[one, one] = first @ first.T
        for other in spans[i + 1 :]:
            gram[one, other] = first @ block(other).T
            gram[other, one] = gram[one, other].T
    return gram
