"""G and its cotangents in closed form, for a classifier that is a chain of linear maps and gates: the closed form of fully connected nets.

With a_0 = x, z_l = W_l a_{l-1} + b_l, a_l = relu(z_l), logits z_L, s_l the gates (the derivatives that ``gates`` gives the rectifiers), and
D_L = d(sum mu m)/dz_L, the backward pass and the KKT sum are

    e_l = W_{l+1}^T D_{l+1},        D_l = s_l e_l,        G_W = D_l a_{l-1}^T,        G_b = sum_i D_l.

For F = <v, G> + losses with v = (V_l, v_l), the tangent of the logits along v goes up, T_l = V_l a_{l-1} + v_l + W_l (s_{l-1} T_{l-1}), and
the cotangents of F come down, from Z_L = d losses/dz_L:

    A_{l-1} = V_l^T D_l + W_l^T Z_l,        Z_l = s_l A_l + e_l T_l ds_l/dz_l,        dF/dx = A_0,        dF/dmu_ij = T_{L, y} - T_{L, j}.

These are the seven matrix products per map (five for the first) that autograd does too, without its graph, with fewer passes over
activations, and with one place to choose the precision of products. ``<v, G>`` alone needs no G: six.

A gate of width w and slope k has s = k + (1 - k) sigmoid(z / w), so that (1 - k) w ds/dz = (s - k)(1 - s), and the last term is
h_l U_l / ((1 - k) w) with h_l = D_l - k e_l and U_l = T_l - s_l T_l. Both are made in place of what nobody needs any more.
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
    """A linear map and the gate behind it.

    Attributes:
        weight: its name.
        bias: its name, None without.
        gate: its name, None behind the last map.
        slope: of the gate's rectifier for negative inputs.
    """

    weight: str
    bias: str | None
    gate: str | None
    slope: float


@dataclass(frozen=True)
class Activations:
    """What the two passes of a micro-batch leave: per link a ``[B, in]``, D and, but for the last, s and h ``[B, out]``."""

    widths: Mapping[str, float]
    inputs: list[Tensor]
    deltas: list[Tensor]
    gates: list[Tensor]
    gate_slopes: list[Tensor]


def closed_form_layers(classifier: GatedClassifier) -> tuple[Layer, ...] | None:
    """The links of a chain that flattens its input first; None for any other classifier."""
    nodes = [node for node in classifier.graph.graph.nodes if not _does_nothing(classifier.graph, node)]
    if len(nodes) < 4 or any(len(node.users) != 1 for node in nodes[:-1]):
        return None
    if [nodes[0].op, nodes[-1].op] != ["placeholder", "output"] or not _flattens(classifier.graph, nodes[1]):
        return None
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
    own = {id(t) for t in tensors if isinstance(t, nn.Parameter)}
    if len(own) < len(tensors):  # tied, or no parameter
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
        links: of the classifier.
        theta: its parameters, detached.
        precision: of matrix products: ``float32`` is that of theta, ``bfloat16`` rounds both sides of each product and sums in float32.
    """

    def __init__(self, links: tuple[Layer, ...], theta: Mapping[str, Tensor], precision: str = "float32") -> None:
        self.links, self.theta, self.low = links, theta, precision == "bfloat16"
        self.weights = [self._operand(theta[link.weight]) for link in links]

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
            own = dict(zip(self._names(), parts, strict=True))
        else:
            with torch.no_grad():
                margins, passed = self._pass(widths, x, labels, multipliers)
                own = self._sum(passed, on_ready)
        return margins, {k: own[k] if k in own else torch.zeros_like(t) for k, t in self.theta.items()}

    def directional_sum(
        self, widths: Mapping[str, float], v: Mapping[str, Tensor], x: Tensor, labels: Tensor, multipliers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Margins and <v, G> of one micro-batch at gates of ``widths`` with their graph, as ``directional.directional_sum``."""
        margins, product = _Product.apply(x, multipliers, labels, self, widths, v)
        return margins, product

    def _names(self) -> list[str]:
        return [name for link in self.links for name in (link.weight, link.bias) if name]

    def _operand(self, t: Tensor) -> Tensor:
        """A side of a matrix product."""
        return t.bfloat16() if self.low else t

    def _times(self, a: Tensor, b: Tensor, onto: Tensor | None = None, spare: Tensor | None = None) -> Tensor:
        """a b (+ ``onto``, which is overwritten), operands from ``_operand``, the sum in float32 at least.

        ``spare`` is an operand of the result's shape that nobody needs any more: writing into what lies in the caches costs less.
        """
        if not self.low:
            return torch.mm(a, b, out=spare) if onto is None else onto.addmm_(a, b)
        product = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
        return product if onto is None else onto.add_(product)

    def _pass(
        self, widths: Mapping[str, float], x: Tensor, labels: Tensor, multipliers: Tensor
    ) -> tuple[Tensor, Activations]:
        """Margins by the forward, and what the backward to every D leaves."""
        a, inputs, gates = x.flatten(1), [], []
        for link, weight in zip(self.links, self.weights, strict=True):
            inputs.append(self._operand(a))
            z = self._times(inputs[-1], weight.T)
            if link.bias is not None:
                z += self.theta[link.bias]
            if link.gate is not None:
                a = F.leaky_relu(z, link.slope) if link.slope else z.relu()
                s = z.div_(widths[link.gate]).sigmoid_()
                gates.append(s.mul_(1 - link.slope).add_(link.slope) if link.slope else s)
        deltas = [self._operand(_to_logits(multipliers, labels))]
        gate_slopes: list[Tensor] = []
        for link, weight, s in zip(self.links[-2::-1], reversed(self.weights), reversed(gates), strict=False):
            pull = self._times(deltas[0], weight)
            delta = s * pull if link.slope else pull.mul_(s)
            gate_slopes.insert(0, pull.mul_(-link.slope).add_(delta) if link.slope else delta)
            deltas.insert(0, self._operand(delta))
        return pairwise_margins(z, labels), Activations(widths, inputs, deltas, gates, gate_slopes)

    def _sum(self, passed: Activations, on_ready: Ready | None = None) -> dict[str, Tensor]:
        """G, the last map first."""
        G: dict[str, Tensor] = {}
        for link, a, delta in reversed(list(zip(self.links, passed.inputs, passed.deltas, strict=True))):
            own = {link.weight: self._times(delta.T, a)}
            if link.bias is not None:
                own[link.bias] = delta.sum(0, dtype=self.theta[link.bias].dtype)
            G |= own
            for name, part in own.items() if on_ready else ():
                on_ready(name, part)  # type: ignore[misc]
        return G

    def _tangents(self, passed: Activations, v: Mapping[str, Tensor | None]) -> list[Tensor]:
        """U per link, but T of the last; ``v`` may lack tensors. Takes the place of the inputs, which G has used."""
        tangents: list[Tensor] = []
        for i, link in enumerate(self.links):
            along, of_bias = v.get(link.weight), v.get(link.bias) if link.bias else None
            if along is None:
                along = torch.zeros_like(self.theta[link.weight])
            t = self._times(passed.inputs[i], self._operand(along).T)
            if of_bias is not None:
                t += of_bias
            if tangents:
                gated = torch.mul(passed.gates[i - 1], tangents[-1], out=None if self.low else passed.inputs[i])
                self._times(self._operand(gated), self.weights[i].T, onto=t)
                tangents[-1].sub_(gated)
            tangents.append(t)
        return tangents

    def _cotangents(
        self,
        passed: Activations,
        tangents: list[Tensor],
        v: Mapping[str, Tensor | None],
        factor: Tensor | None,
        seeds: Tensor | None,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """d(factor <v, G> + <seeds, margins>)/dx ``[B, in]`` and /dmu ``[B, C]``; without a factor it is 1, without seeds they are 0."""
        seeds = torch.zeros_like(tangents[-1]) if seeds is None else seeds
        z = _to_logits(seeds, labels)
        for i in reversed(range(len(self.links))):
            along = v.get(self.links[i].weight)
            spare = passed.inputs[i] if i else None  # x is not ours
            a = self._times(self._operand(z), self.weights[i], spare=spare)
            if along is not None:
                along = along if factor is None else factor * along
                self._times(passed.deltas[i], self._operand(along), onto=a)
            if i:
                gate, slope = self.links[i - 1].gate, self.links[i - 1].slope
                assert gate is not None
                U = tangents[i - 1] if factor is None else tangents[i - 1].mul_(factor)
                steepness = 1 / ((1 - slope) * passed.widths[gate])
                z = a.mul_(passed.gates[i - 1]).addcmul_(U, passed.gate_slopes[i - 1], value=steepness)
        gmu = pairwise_margins(tangents[-1], labels)
        return a, gmu if factor is None else factor * gmu


class _Sum(torch.autograd.Function):
    """(x, mu) -> margins and G in the order of ``MLPClosedForm._names``; its backward is no graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        multipliers: Tensor,
        labels: Tensor,
        chain: MLPClosedForm,
        widths: Mapping[str, float],
        on_ready: Ready | None,
    ) -> tuple[Tensor, ...]:
        margins, passed = chain._pass(widths, x, labels, multipliers)
        G = chain._sum(passed, on_ready)
        ctx.chain, ctx.passed, ctx.labels, ctx.shape = chain, (passed, None), labels, x.shape
        ctx.set_materialize_grads(False)
        return margins, *(G[name] for name in chain._names())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        chain, (passed, _) = ctx.chain, _taken(ctx)
        v = dict(zip(chain._names(), grads[1:], strict=True))
        gx, gmu = chain._cotangents(passed, chain._tangents(passed, v), v, None, grads[0], ctx.labels)
        return gx.view(ctx.shape), gmu, None, None, None, None


class _Product(torch.autograd.Function):
    """(x, mu) -> margins and <v, G>; its backward is no graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        multipliers: Tensor,
        labels: Tensor,
        chain: MLPClosedForm,
        widths: Mapping[str, float],
        v: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        margins, passed = chain._pass(widths, x, labels, multipliers)
        tangents = chain._tangents(passed, v)
        ctx.chain, ctx.passed, ctx.v = chain, (passed, tangents), v
        ctx.labels, ctx.shape = labels, x.shape
        ctx.set_materialize_grads(False)
        return margins, (multipliers * pairwise_margins(tangents[-1], labels)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        seeds, of_product = grads
        passed, tangents = _taken(ctx)
        if of_product is None:
            of_product = tangents[-1].new_zeros(())
        gx, gmu = ctx.chain._cotangents(passed, tangents, ctx.v, of_product, seeds, ctx.labels)
        return gx.view(ctx.shape), gmu, None, None, None, None


def _taken(ctx: Any) -> Any:
    """What a backward needs, let go of as autograd does: the graph may be held longer."""
    if ctx.passed is None:
        raise RuntimeError("the closed form's graph was differentiated before: its activations are gone, make it anew")
    passed, ctx.passed = ctx.passed, None
    return passed


def _to_logits(of_margins: Tensor, labels: Tensor) -> Tensor:
    """d sum(of_margins m)/d logits ``[B, C]``."""
    out = -of_margins
    return out.scatter_add_(1, labels[:, None], of_margins.sum(1, keepdim=True))


def _does_nothing(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), (nn.Identity, nn.Dropout))


def _flattens(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node makes ``[B, *S]`` to ``[B, features]``."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    flattens = node.target == "flatten" if node.op == "call_method" else node.target is torch.flatten
    given = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))}
    given |= {k: v for k, v in node.kwargs.items() if k in given}
    return flattens and node.op in ("call_method", "call_function") and given == {"start_dim": 1, "end_dim": -1}
