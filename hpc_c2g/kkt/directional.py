"""<v, G> without G: a weight's gradient is never formed where only its product with a direction is wanted.

For a linear map y_l = W_l a_l + b_l inside Phi, G's parts are sums of outer products, G_W = sum_i delta_i a_i^T and G_b = sum_i delta_i
with delta = d(sum mu m)/dy_l, so that

    <V_l, G_W> + <v_l, G_b> = sum_i <delta_i, V_l a_i + v_l>.

This saves one of the seven matrix products per layer that differentiating <v, G> through G takes. Parameters of other layers
than linear maps and convolutions (the affine part of a normalization) use their G.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hpc_c2g.kkt.margins import pairwise_margins
from hpc_c2g.kkt.stationarity import Classifier

LINEAR_MAPS: set[Callable[..., Any]] = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
}


class _Recorder(TorchFunctionMode):
    """Detaches the parameters of linear maps, and records each map's output y and its tangent V a + v."""

    def __init__(self, leaves: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.directions = {id(leaf): v[name] for name, leaf in leaves.items()}
        self.outputs: list[GradientEdge] = []  # not y itself, which the classifier may overwrite in place
        self.tangents: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        weight: Any = arguments.get("weight")
        bias: Any = arguments.get("bias")
        if func not in LINEAR_MAPS or id(weight) not in self.directions or not arguments["input"].requires_grad:
            return func(*args, **(kwargs or {}))
        rest = {name: value for name, value in arguments.items() if name not in ("input", "weight", "bias")}
        bias_is_parameter = id(bias) in self.directions  # the bias may be a constant, or None
        y = func(arguments["input"], weight.detach(), bias.detach() if bias_is_parameter else bias, *args[3:], **rest)
        bias_direction = self.directions[id(bias)] if bias_is_parameter else None
        self.outputs.append(get_gradient_edge(y))
        self.tangents.append(func(arguments["input"], self.directions[id(weight)], bias_direction, *args[3:], **rest))
        return y


def directional_sum(
    phi: Classifier,
    theta: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    x: Tensor,
    labels: Tensor,
    multipliers: Tensor,
) -> tuple[Tensor, Tensor]:
    """Margins and <v, G> of one micro-batch, with their graph with respect to x and mu.

    Args:
        phi: the classifier with smooth gates.
        theta: parameters, any ``requires_grad``.
        v: Direction per parameter name.
        x: normalized inputs ``[B, *S]``, requires grad.
        labels: ``[B]``.
        multipliers: mu ``[B, C]``, zero at j = y_i.

    Returns:
        margins ``[B, C]`` and a scalar.
    """
    leaves = {k: t.detach().requires_grad_() for k, t in theta.items()}
    with torch.enable_grad():
        with _Recorder(leaves, v) as recorder:
            margins = pairwise_margins(phi(leaves, x), labels)
        grads = torch.autograd.grad(
            (multipliers * margins).sum(),
            [*recorder.outputs, *leaves.values()],
            create_graph=True,
            allow_unused=True,  # parameters used by linear maps only, maps whose output is unused
        )
        seeds = [*recorder.tangents, *(v[k] for k in leaves)]
        products = [(g * seed).sum() for g, seed in zip(grads, seeds, strict=True) if g is not None]
        return margins, torch.stack(products).sum()
