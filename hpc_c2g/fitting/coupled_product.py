"""Products with the Gram matrix of margin gradients where batch statistics couple the samples: every margin depends on every sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hpc_c2g.kkt.margins import other_classes, pairwise_margins
from hpc_c2g.kkt.stationarity import Classifier


def coupled_product(
    phi: Classifier, theta: Mapping[str, Tensor], scales: Mapping[str, float], x: Tensor, y: Tensor
) -> Callable[[Tensor], Tensor]:
    """mu ``[M]`` -> J J^T mu ``[M]``, with J = {s_k grad_k m_ij} over all j != y_i, rows ordered by i, then j.

    Builds one graph of the whole batch; each product is a backward pass through it for J^T mu, and one through that pass for J of the
    result. The matrix itself would take a backward pass per row.

    Args:
        phi: Classifier with the statistics of the batch that it is called on.
        theta: Parameters of the classifier.
        scales: s_k = e^(a (1 - lambda_k)) per parameter.
        x: the whole batch ``[n, *S]``.
        y: labels ``[n]``.
    """
    leaves = {k: t.detach().requires_grad_() for k, t in theta.items()}
    with torch.enable_grad():
        margins = pairwise_margins(phi(leaves, x), y)
        rows = margins[other_classes(y, margins.shape[1])]
        seeds = torch.zeros_like(rows).requires_grad_()  # their value does not matter: J^T mu is linear in mu
        sums = torch.autograd.grad(
            rows, list(leaves.values()), seeds, create_graph=True, materialize_grads=True, allow_unused=True
        )

    def product(mu: Tensor) -> Tensor:
        parts = torch.autograd.grad(rows, list(leaves.values()), mu, retain_graph=True, materialize_grads=True)
        direction = [scales[k] ** 2 * part for k, part in zip(leaves, parts, strict=True)]
        (result,) = torch.autograd.grad(sums, seeds, direction, retain_graph=True, materialize_grads=True)
        return result

    return product
