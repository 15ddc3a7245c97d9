"""Scale-free smooth gates: the forward pass stays exact ReLU, the derivative becomes sigmoid(z / width).

A ReLU's derivative has zero derivative, so the path x -> gates -> G carries no gradient (Haim et al. 2022 use
sigmoid(alpha z) with one fixed alpha). Here width = gamma * s with s the layer's own pre-activation scale, so that one gamma
fits every layer and every net.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from hpc_c2g.errors import UserError
from hpc_c2g.kkt.normalization import Statistics, replace_norms, use_statistics

_RELU_CALLS = {F.relu, torch.relu, torch.relu_, F.relu_}
_LEAKY_CALLS = {F.leaky_relu, F.leaky_relu_}


class _Gate(torch.autograd.Function):
    """Leaky ReLU whose derivative is slope + (1 - slope) sigmoid(z / width), differentiable once more."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, width: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(z, width)
        ctx.slope = slope
        return F.leaky_relu(z, slope) if slope else F.relu(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        z, width = ctx.saved_tensors
        gate = torch.sigmoid(z / width)
        if ctx.slope:
            gate = ctx.slope + (1 - ctx.slope) * gate
        return grads[0] * gate, None, None


class GatedReLU(nn.Module):
    """A leaky ReLU with a smooth gate; the buffer ``width`` is passed in at each call of the classifier."""

    width: Tensor

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.register_buffer("width", torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        """Activations of the shape of ``z``."""
        out: Tensor = _Gate.apply(z, self.width, self.slope)
        return out


class GatedClassifier:
    """Phi(x; theta) as a pure function of (theta, widths, x), every ReLU and LeakyReLU replaced by a smooth gate.

    Args:
        model: an ``nn.Module`` that ``torch.fx`` can trace; it is not changed.

    Raises:
        UserError: the module cannot be traced, or it has a BatchNorm without running statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            graph = fx.symbolic_trace(copy.deepcopy(model).eval())
        except Exception as error:
            raise UserError(
                f"the classifier cannot be traced by torch.fx: {str(error).splitlines()[0]}",
                "avoid control flow that depends on the input in its forward",
            ) from error
        self.gates, self.norms = _replace_activations(graph), replace_norms(graph)
        self.graph = graph.eval().requires_grad_(False)
        # tracing drops what forward never uses; a tied tensor keeps all its names
        self.known = {k for k, _ in graph.named_parameters(remove_duplicate=False)}
        self.buffers = {k: b.detach() for k, b in graph.named_buffers() if k.removesuffix(".width") not in self.gates}

    def __call__(
        self,
        theta: Mapping[str, Tensor],
        widths: Mapping[str, float],
        x: Tensor,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """Logits ``[B, C]``.

        Args:
            theta: parameters.
            widths: gate width > 0 per gate name.
            x: normalized inputs ``[B, *S]``.
            statistics: batch statistics that every BatchNorm uses instead of its frozen ones; None uses the frozen ones.
        """
        used = {k: t for k, t in theta.items() if k in self.known}
        state = {**used, **self.buffers, **{f"{gate}.width": x.new_full((), width) for gate, width in widths.items()}}
        with use_statistics(self.norms, statistics):
            logits: Tensor = functional_call(self.graph, state, (x,))
        return logits

    def to(self, device: torch.device, dtype: torch.dtype) -> GatedClassifier:
        """Move the buffers and weights in place; returns self."""
        self.graph.to(device, dtype)
        self.buffers = {k: b.to(device, dtype if b.is_floating_point() else b.dtype) for k, b in self.buffers.items()}
        return self

    @torch.no_grad()
    def pre_activation_scales(
        self, theta: Mapping[str, Tensor], probes: Tensor, statistics: Statistics | None = None
    ) -> dict[str, float]:
        """s per gate: root mean square of the pre-activation over ``probes`` ``[B, *S]``, with their own statistics if given."""
        scales: dict[str, float] = {}
        hooks = [
            self.graph.get_submodule(gate).register_forward_pre_hook(
                lambda _, args, gate=gate: scales.__setitem__(gate, max(float(args[0].square().mean().sqrt()), 1e-30))
            )
            for gate in self.gates
        ]
        try:
            self(theta, dict.fromkeys(self.gates, 1.0), probes, statistics)
        finally:
            for hook in hooks:
                hook.remove()
        return scales


def _replace_activations(graph: fx.GraphModule) -> list[str]:
    """Replace every (leaky) ReLU call by a GatedReLU module; returns the module names."""
    names: list[str] = []
    for node in list(graph.graph.nodes):
        slope = _slope(graph, node)
        if slope is None:
            continue
        source = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(source, fx.Node)
        name = f"gate{len(names)}"
        graph.add_submodule(name, GatedReLU(slope))
        with graph.graph.inserting_after(node):
            gate = graph.graph.call_module(name, (source,))
        node.replace_all_uses_with(gate)
        if _in_place(graph, node):  # later readers of the input see the overwritten value
            order = {n: i for i, n in enumerate(graph.graph.nodes)}
            for user in [u for u in source.users if order[u] > order[gate]]:
                user.replace_input_with(source, gate)
        graph.graph.erase_node(node)
        names.append(name)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return names


def _in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if an activation node overwrites its input."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or bool(node.kwargs.get("inplace", False))


def _slope(graph: fx.GraphModule, node: fx.Node) -> float | None:
    """The negative slope of an activation node, None for any other node."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(module, nn.ReLU):
            return 0.0
        if isinstance(module, nn.LeakyReLU):
            return float(module.negative_slope)
    if (node.op == "call_function" and node.target in _RELU_CALLS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    ):
        return 0.0
    if node.op == "call_function" and node.target in _LEAKY_CALLS:
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return float(operator.index(given) if isinstance(given, int) else given)  # type: ignore[arg-type]
    return None
