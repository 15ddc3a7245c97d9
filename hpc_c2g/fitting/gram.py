"""Gram matrix of the margin gradients of independent samples, built from the factors of linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from hpc_c2g.kkt.margins import other_classes, pairwise_margins

MEMORY = 2 * 10**9  # bytes of per-row gradients, with their temporaries, held at a time
CHUNK = 256  # samples per forward pass
Factors = dict[tuple[str, str], tuple[Tensor, Tensor]]


def spans(total: int, size: int) -> list[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(total)``."""
    return [slice(i, i + size) for i in range(0, total, size)]


def margin_gram(model: nn.Module, scales: Mapping[str, float], x: Tensor, y: Tensor, memory: int = MEMORY) -> Tensor:
    """J J^T = sum_k s_k^2 <grad_k m_ij, grad_k m_i'j'> over all j != y_i, ``[M, M]``, rows ordered by i, then j.

    A linear layer called once on a batch of vectors a_i has grad m_ij = delta_ij a_i^T, whose inner products are <delta, delta'> <a, a'>,
    and <delta, delta'> for its bias: no gradient is formed. Gradients of the other tensors are formed in blocks of rows; if not all
    blocks fit in memory, the second block of each pair is recomputed.

    Args:
        model: Classifier in eval mode, in the dtype of ``x``.
        scales: s_k = e^(a (1 - lambda_k)) per parameter.
        x: Normalized inputs ``[n, *S]``.
        y: Labels ``[n]``.
        memory: Bytes for the row gradients (at least one row is held).
    """
    theta = {k: p.detach() for k, p in model.named_parameters()}
    parts = [_linear_factors(model, theta, x[s], y[s]) for s in spans(len(x), CHUNK)]
    classes = model(x[:1]).shape[1]
    rows, others = other_classes(y, classes).nonzero(as_tuple=True)
    gram = torch.zeros(len(rows), len(rows)).to(x)
    for weight, bias in parts[0]:
        inputs, deltas = (torch.cat(t) for t in zip(*(p[weight, bias] for p in parts), strict=True))
        delta = deltas[rows, others]
        kernel = scales[weight] ** 2 * (inputs @ inputs.T)[rows][:, rows]
        gram += (delta @ delta.T) * (kernel + scales[bias] ** 2 if bias else kernel)
    rest = {k: t for k, t in theta.items() if not any(k in names for names in parts[0])}
    if not rest:
        return gram

    def margin(part: dict[str, Tensor], sample: Tensor, sign: Tensor) -> Tensor:
        return torch.sum(functional_call(model, {**theta, **part}, (sample[None],))[0] * sign)

    def block(span: slice) -> Tensor:
        sign = F.one_hot(y[rows[span]], classes).to(x) - F.one_hot(others[span], classes).to(x)
        gradients = vmap(grad(margin), (None, 0, 0))(rest, x[rows[span]], sign)
        return torch.cat([scales[k] * gradients.pop(k).flatten(1) for k in rest], 1)

    # a quarter each for two blocks and for the second block's gradients before and after scaling
    blocks = spans(len(rows), max(1, memory // (4 * x.element_size() * sum(t.numel() for t in rest.values()))))
    for i, one in enumerate(blocks):
        first = block(one)
        gram[one, one] += first @ first.T
        for other in blocks[i + 1 :]:
            product = first @ block(other).T
            gram[one, other] += product
            gram[other, one] += product.T
    return gram


def _linear_factors(model: nn.Module, theta: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Factors:
    """(weight, bias or "") -> a ``[B, in]`` and delta_ij = dm_ij/d(output) ``[B, C, out]`` of each layer that allows the product form."""
    leaves = {k: t.clone().requires_grad_() for k, t in theta.items()}
    names = {id(t): k for k, t in leaves.items()}
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    own = {m for m in model.modules() if type(m) is nn.Linear and all(uses.count(id(p)) < 2 for p in m.parameters())}
    calls: list[tuple[tuple[str, str], Tensor, Tensor]] = []

    def record(module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        calls.append(((names[id(module.weight)], names.get(id(module.bias), "")), inputs[0].detach(), out))
        return out.clone()  # an activation in place must not overwrite the recorded output

    hooks = [m.register_forward_hook(record) for m in own]
    margins = pairwise_margins(functional_call(model, leaves, (x,)), y)
    for hook in hooks:
        hook.remove()
    keys = [key for key, _, _ in calls]
    once = [c for c in calls if keys.count(c[0]) == 1 and c[1].ndim == 2]
    if not once:
        return {}
    outs = [out for _, _, out in once]
    columns = [torch.autograd.grad(m.sum(), outs, retain_graph=True, materialize_grads=True) for m in margins.T]
    return {call[0]: (call[1], torch.stack(delta, 1)) for call, *delta in zip(once, *columns, strict=True)}
