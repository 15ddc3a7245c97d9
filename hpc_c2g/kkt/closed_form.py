"""G and its cotangents in closed form, for a classifier that alternates linear maps and gates (a fully connected net).

With a_0 = x, z_l = W_l a_{l-1} + b_l, a_l = relu(z_l), logits z_L, s_l the gates (the derivatives that ``gates`` gives the rectifiers), and
D_L = d(sum mu m)/dz_L, the backward pass and the KKT sum are

    e_l = W_{l+1}^T D_{l+1},        D_l = s_l e_l,        G_W = D_l a_{l-1}^T,        G_b = sum_i D_l.

For F = <v, G> + losses with v = (V_l, v_l), the tangent of the logits along v is computed forwards,
T_l = V_l a_{l-1} + v_l + W_l (s_{l-1} T_{l-1}), and the cotangents of F backwards, from Z_L = d losses/dz_L:

    A_{l-1} = V_l^T D_l + W_l^T Z_l,        Z_l = s_l A_l + e_l T_l ds_l/dz_l,        dF/dx = A_0,        dF/dmu_ij = T_{L, y} - T_{L, j}.

These are the seven matrix products per map (five for the first) that autograd does too, without its graph, with fewer passes over
activations, and with one place to choose the precision of products. ``<v, G>`` alone needs no G: six.

A gate of width w and slope k has s = k + (1 - k) sigmoid(z / w), so that (1 - k) w ds/dz = (s - k)(1 - s), and the last term is
h_l U_l / ((1 - k) w) with h_l = D_l - k e_l and U_l = T_l - s_l T_l. Both overwrite tensors that are no longer needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hpc_c2g.kkt.gates import GatedClassifier, GatedReLU
from hpc_c2g.kkt.margins import pairwise_margins

Ready = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Layer:
    """A linear map and the gate after it.

    Attributes:
        weight: Name of the weight parameter.
        bias: Name of the bias parameter, None without a bias.
        gate: Name of the gate module, None after the last map.
        slope: Slope of the gate's rectifier for negative inputs.
    """

    weight: str
    bias: str | None
    gate: str | None
    slope: float


@dataclass(frozen=True)
class Activations:
    """Saved tensors of the forward and backward pass of a micro-batch, one per layer.

    Attributes:
        widths: Gate width per gate name.
        inputs: a ``[B, in]``, the input of each linear map.
        deltas: D ``[B, out]``, the gradient of sum mu m with respect to each pre-activation.
        gates: s ``[B, out]`` of each gate.
        gate_slopes: h ``[B, out]`` of each gate.
    """

    widths: Mapping[str, float]
    inputs: list[Tensor]
    deltas: list[Tensor]
    gates: list[Tensor]
    gate_slopes: list[Tensor]


def closed_form_layers(classifier: GatedClassifier) -> tuple[Layer, ...] | None:
    """The layers of an MLP that flattens its input first; None for any other classifier."""
    nodes = [node for node in classifier.graph.graph.nodes if not _is_noop(classifier.graph, node)]
    if len(nodes) < 4 or any(len(node.users) != 1 for node in nodes[:-1]):
        return None
    if [nodes[0].op, nodes[-1].op] != ["placeholder", "output"] or not _is_flatten(classifier.graph, nodes[1]):
        return None
    # private, but torch has no public way to ask a module for its hooks
    if any(m._forward_hooks or m._forward_pre_hooks for m in classifier.graph.modules()):
        return None
    modules: list[Any] = [
        classifier.graph.get_submodule(str(n.target)) if n.op == "call_module" else None for n in nodes[2:-1]
    ]
    maps, gates = modules[::2], modules[1::2]
    alternate = len(maps) == len(gates) + 1 and all(isinstance(gate, GatedReLU) and gate.slope != 1 for gate in gates)
    if not alternate or any(type(linear) is not nn.Linear for linear in maps) or len({*map(id, maps)}) < len(maps):
        return None
    tensors = [t for linear in maps for t in (linear.weight, linear.bias) if t is not None]
    parameters = {id(t) for t in tensors if isinstance(t, nn.Parameter)}
    if len(parameters) < len(tensors):  # tied, or no parameter
        return None
    names = [str(n.target) for n in nodes[2:-1]]
    return tuple(
        Layer(
            f"{name}.weight",
            None if linear.bias is None else f"{name}.bias",
            gate_name,
            0.0 if gate is None else gate.slope,
        )
        for name, linear, gate_name, gate in zip(names[::2], maps, [*names[1::2], None], [*gates, None], strict=True)
    )


class MLPClosedForm:
    """KKT sums of one classifier; the same results as ``stationarity.kkt_sum`` and ``directional.directional_sum``.

    Args:
        layers: Layers of the classifier, from ``closed_form_layers``.
        theta: Parameters of the classifier, detached.
        precision: Precision of matrix products: ``float32`` uses theta's dtype, ``bfloat16`` rounds both operands and sums in float32.
    """

    def __init__(self, layers: tuple[Layer, ...], theta: Mapping[str, Tensor], precision: str = "float32") -> None:
        self.layers, self.theta, self.low = layers, theta, precision == "bfloat16"
        self.weights = [self._cast(theta[layer.weight]) for layer in layers]

    def kkt_sum(
        self,
        widths: Mapping[str, float],
        x: Tensor,
        labels: Tensor,
        multipliers: Tensor,
        keep_graph: bool = False,
        on_ready: Ready | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Margins and G of one micro-batch at gates of ``widths``, as ``stationarity.kkt_sum``."""
        if keep_graph:
            margins, *parts = _Sum.apply(x, multipliers, labels, self, widths, on_ready)
            grads = dict(zip(self._names(), parts, strict=True))
        else:
            with torch.no_grad():
                margins, saved = self._pass(widths, x, labels, multipliers)
                grads = self._sum(saved, on_ready)
        return margins, {k: grads[k] if k in grads else torch.zeros_like(t) for k, t in self.theta.items()}

    def directional_sum(
        self, widths: Mapping[str, float], v: Mapping[str, Tensor], x: Tensor, labels: Tensor, multipliers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Margins and <v, G> of one micro-batch at gates of ``widths`` with their graph, as ``directional.directional_sum``."""
        margins, product = _Product.apply(x, multipliers, labels, self, widths, v)
        return margins, product

    def _names(self) -> list[str]:
        return [name for layer in self.layers for name in (layer.weight, layer.bias) if name]

    def _cast(self, t: Tensor) -> Tensor:
        """Cast an operand of a matrix product."""
        return t.bfloat16() if self.low else t

    def _times(self, a: Tensor, b: Tensor, onto: Tensor | None = None, spare: Tensor | None = None) -> Tensor:
        """a b (+ ``onto``, which is overwritten), operands from ``_cast``, the sum in float32 at least.

        ``spare`` is an operand of the result's shape that is no longer needed: writing into cached memory costs less.
        """
        if not self.low:
            return torch.mm(a, b, out=spare) if onto is None else onto.addmm_(a, b)
        product = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
        return product if onto is None else onto.add_(product)

    def _pass(
        self, widths: Mapping[str, float], x: Tensor, labels: Tensor, multipliers: Tensor
    ) -> tuple[Tensor, Activations]:
        """Margins from the forward pass, and the activations of forward and backward."""
        a, inputs, gates = x.flatten(1), [], []
        for layer, weight in zip(self.layers, self.weights, strict=True):
            inputs.append(self._cast(a))
            z = self._times(inputs[-1], weight.T)
            if layer.bias is not None:
                z += self.theta[layer.bias]
            if layer.gate is not None:
                a = F.leaky_relu(z, layer.slope) if layer.slope else z.relu()
                s = z.div_(widths[layer.gate]).sigmoid_()
                gates.append(s.mul_(1 - layer.slope).add_(layer.slope) if layer.slope else s)
        deltas = [self._cast(_to_logits(multipliers, labels))]
        gate_slopes: list[Tensor] = []
        for layer, weight, s in zip(self.layers[-2::-1], reversed(self.weights), reversed(gates), strict=False):
            error = self._times(deltas[0], weight)
            delta = s * error if layer.slope else error.mul_(s)
            gate_slopes.insert(0, error.mul_(-layer.slope).add_(delta) if layer.slope else delta)
            deltas.insert(0, self._cast(delta))
        return pairwise_margins(z, labels), Activations(widths, inputs, deltas, gates, gate_slopes)

    def _sum(self, saved: Activations, on_ready: Ready | None = None) -> dict[str, Tensor]:
        """G, the last map first."""
        G: dict[str, Tensor] = {}
        for layer, a, delta in reversed(list(zip(self.layers, saved.inputs, saved.deltas, strict=True))):
            grads = {layer.weight: self._times(delta.T, a)}
            if layer.bias is not None:
                grads[layer.bias] = delta.sum(0, dtype=self.theta[layer.bias].dtype)
            G |= grads
            for name, part in grads.items() if on_ready else ():
                on_ready(name, part)  # type: ignore[misc]
        return G

    def _tangents(self, saved: Activations, v: Mapping[str, Tensor | None]) -> list[Tensor]:
        """U per layer, T for the last; ``v`` may lack tensors. Overwrites the inputs, which G no longer needs."""
        tangents: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            direction, bias_direction = v.get(layer.weight), v.get(layer.bias) if layer.bias else None
            if direction is None:
                direction = torch.zeros_like(self.theta[layer.weight])
            t = self._times(saved.inputs[i], self._cast(direction).T)
            if bias_direction is not None:
                t += bias_direction
            if tangents:
                gated = torch.mul(saved.gates[i - 1], tangents[-1], out=None if self.low else saved.inputs[i])
                self._times(self._cast(gated), self.weights[i].T, onto=t)
                tangents[-1].sub_(gated)
            tangents.append(t)
        return tangents

    def _cotangents(
        self,
        saved: Activations,
        tangents: list[Tensor],
        v: Mapping[str, Tensor | None],
        factor: Tensor | None,
        seeds: Tensor | None,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """d(factor <v, G> + <seeds, margins>)/dx ``[B, in]`` and /dmu ``[B, C]``; ``factor`` None is 1, ``seeds`` None is 0."""
        seeds = torch.zeros_like(tangents[-1]) if seeds is None else seeds
        z = _to_logits(seeds, labels)
        for i in reversed(range(len(self.layers))):
            direction = v.get(self.layers[i].weight)
            spare = saved.inputs[i] if i else None  # x belongs to the caller
            a = self._times(self._cast(z), self.weights[i], spare=spare)
            if direction is not None:
                direction = direction if factor is None else factor * direction
                self._times(saved.deltas[i], self._cast(direction), onto=a)
            if i:
                gate, slope = self.layers[i - 1].gate, self.layers[i - 1].slope
                assert gate is not None
                U = tangents[i - 1] if factor is None else tangents[i - 1].mul_(factor)
                steepness = 1 / ((1 - slope) * saved.widths[gate])
                z = a.mul_(saved.gates[i - 1]).addcmul_(U, saved.gate_slopes[i - 1], value=steepness)
        gmu = pairwise_margins(tangents[-1], labels)
        return a, gmu if factor is None else factor * gmu


class _Sum(torch.autograd.Function):
    """(x, mu) -> margins and G in the order of ``MLPClosedForm._names``; its backward is not differentiable again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        multipliers: Tensor,
        labels: Tensor,
        closed_form: MLPClosedForm,
        widths: Mapping[str, float],
        on_ready: Ready | None,
    ) -> tuple[Tensor, ...]:
        margins, saved = closed_form._pass(widths, x, labels, multipliers)
        G = closed_form._sum(saved, on_ready)
        ctx.closed_form, ctx.saved, ctx.labels, ctx.shape = closed_form, (saved, None), labels, x.shape
        ctx.set_materialize_grads(False)
        return margins, *(G[name] for name in closed_form._names())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        closed_form, (saved, _) = ctx.closed_form, _take_saved(ctx)
        v = dict(zip(closed_form._names(), grads[1:], strict=True))
        gx, gmu = closed_form._cotangents(saved, closed_form._tangents(saved, v), v, None, grads[0], ctx.labels)
        return gx.view(ctx.shape), gmu, None, None, None, None


class _Product(torch.autograd.Function):
    """(x, mu) -> margins and <v, G>; its backward is not differentiable again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        multipliers: Tensor,
        labels: Tensor,
        closed_form: MLPClosedForm,
        widths: Mapping[str, float],
        v: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        margins, saved = closed_form._pass(widths, x, labels, multipliers)
        tangents = closed_form._tangents(saved, v)
        ctx.closed_form, ctx.saved, ctx.v = closed_form, (saved, tangents), v
        ctx.labels, ctx.shape = labels, x.shape
        ctx.set_materialize_grads(False)
        return margins, (multipliers * pairwise_margins(tangents[-1], labels)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        seeds, product_grad = grads
        saved, tangents = _take_saved(ctx)
        if product_grad is None:
            product_grad = tangents[-1].new_zeros(())
        gx, gmu = ctx.closed_form._cotangents(saved, tangents, ctx.v, product_grad, seeds, ctx.labels)
        return gx.view(ctx.shape), gmu, None, None, None, None


def _take_saved(ctx: Any) -> Any:
    """Return the saved activations and free them, as autograd does: the graph may be held longer."""
    if ctx.saved is None:
        raise RuntimeError(
            "the closed form's graph was differentiated before and its activations are freed: evaluate the sum again"
        )
    saved, ctx.saved = ctx.saved, None
    return saved


def _to_logits(of_margins: Tensor, labels: Tensor) -> Tensor:
    """d sum(of_margins m)/d logits ``[B, C]``."""
    out = -of_margins
    return out.scatter_add_(1, labels[:, None], of_margins.sum(1, keepdim=True))


def _is_noop(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), (nn.Identity, nn.Dropout))


def _is_flatten(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if a node reshapes ``[B, *S]`` to ``[B, features]``."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    flattens = node.target == "flatten" if node.op == "call_method" else node.target is torch.flatten
    given = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))}
    given |= {k: v for k, v in node.kwargs.items() if k in given}
    return flattens and node.op in ("call_method", "call_function") and given == {"start_dim": 1, "end_dim": -1}
