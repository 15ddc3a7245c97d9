"""Degrees of activations: the linear equations between the rates of a classifier, read off its traced graph.

Every activation scales like e^(a d); its degree d is a linear form in the rates. ``rates.py`` solves them.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from hpc_c2g.errors import UserError

Array = NDArray[np.float64]
ZERO = 1e-9  # rates and degrees are sums of small fractions: anything below is round-off

# Effect of each operation on the degree, for modules, functions and methods alike: names are compared in lower case
# without underscores, so ``nn.MaxPool2d``, ``F.max_pool2d`` and ``relu_`` need no entry of their own.
KEEPS = re.compile(
    r"(leaky|r)?relu|abs|neg|(adaptive)?(max|avg)pool[123]d|(feature)?(alpha)?dropout([123]d)?|identity|upsample"
    r"|interpolate|(reflection|replication|circular)pad[123]d|(un)?flatten|view(as)?|reshape|permute|transpose|swapaxes"
    r"|movedim|(un)?squeeze|expand(as)?|repeat|(pixel(un)?|channel)shuffle|getitem|select|narrow|indexselect|unbind"
    r"|(tensor)?split|chunk|contiguous|clone|to|float|double|typeas|flip|roll|mean|sum|amax|amin|t|\.m?t|\.data"
)
ADDS = re.compile(r"[ir]?(add|sub)|subtract")
JOINS = re.compile(r"cat|concat(enate)?|[hv]?stack|max(imum)?|min(imum)?")
MULTIPLIES = re.compile(r"i?mul|multiply|i?matmul|[bm]m|einsum")
DIVIDES = re.compile(r"i?truediv|div(ide)?")
LINEAR = re.compile(r"linear|conv(transpose)?[123]d")
NORMALIZES = re.compile(r"(sync)?(batch|instance)norm([123]d)?|(layer|group|rms)norm")
SIZES = re.compile(r"size|dim|numel|ndimension|\..*")
CURVED = re.compile(
    r"tanh|(log)?sigmoid|gelu|silu|[sc]?elu|mish|soft(plus|sign)|hard(swish|sigmoid|tanh)|relu6|glu|(log)?softmax(2d)?"
    r"|softmin|exp|log|sin|cos|multiheadattention|scaleddotproductattention|transformer.*"
)


class Value(NamedTuple):
    """Degree of one tensor of the graph."""

    degree: Array  # [K], coefficients over the rates
    fixed: bool  # made of parameters and constants alone, whatever the input


class Equation(NamedTuple):
    """One condition on the rates."""

    culprit: str  # module or call to name when it cannot hold
    row: Array  # [K], row @ lambda = 0


class Degrees:
    """Degrees of all tensors of a traced graph, and the equations between the rates, from one pass in execution order."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.names = [name for name, _ in model.named_parameters()]
        # by identity: a tensor tied under two names is one variable
        self.index = {id(p): k for k, p in enumerate(model.parameters())}
        self.zero: Array = np.zeros(len(self.names))
        self.still = Value(self.zero, True)  # what does not scale: numbers, buffers, sizes
        self.values: dict[fx.Node, Value] = {}
        self.equations: list[Equation] = []
        self.norms: dict[fx.Node, str] = {}  # module path, empty for a function
        self.norm_inputs: dict[str, Array] = {}  # by module path
        self.weights: set[int] = set()  # parameters that multiply something
        for node in graph.nodes:
            self.values[node] = self._read(node)

    def _read(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return Value(self.zero, False)
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return self._parameter(getattr(self.model.get_submodule(path), name))
        if node.op == "output":
            logits = node.args[0]
            if not isinstance(logits, fx.Node):
                kind = type(logits).__name__
                raise UserError(f"the classifier returns a {kind}, not a tensor", "return the logits alone")
            self.result = logits
            return self.values[logits]
        kind, args, kwargs, operands = _kind(node), node.args, node.kwargs, _operands(node)
        x = self._argument(node, 0, "input") or self.still
        moving = any(self.values[n].degree.any() for n in operands)
        module: Any = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        own = {name for name, _ in module.named_parameters()} if module is not None else set()
        if NORMALIZES.fullmatch(kind) and _is_torch(node) and own <= {"weight", "bias"}:
            return self._normalize(node, kind, x)
        if not (moving or own) or SIZES.fullmatch(kind):  # any operation on sizes or on the raw input
            return Value(self.zero, all(self.values[n].fixed for n in operands))
        # user functions may have any name, and a parametrized or pruned module has other parameters
        if not (_is_torch(node) and own <= {"weight", "bias"}):
            raise _not_homogeneous(node, kind)
        if KEEPS.fullmatch(kind):
            return x
        if LINEAR.fullmatch(kind):
            weight, bias = self._argument(node, 1, "weight"), self._argument(node, 2, "bias")
            out = self._multiply([x, weight or self.still])
            self._equate(node, "its bias must scale like its output", bias or out, out)
            return out
        if kind == "prelu":
            self._equate(node, "its slope must not scale", self._argument(node, 1, "weight") or self.still, self.still)
            return x
        if ADDS.fullmatch(kind):
            return self._add(node, *args, kwargs.get("other"))
        if JOINS.fullmatch(kind):
            return self._add(node, *operands)
        if kind in ("clamp", "clampmin", "clampmax", "clip"):
            return self._add(node, *args, *kwargs.values())
        if kind in ("zeropad1d", "zeropad2d", "zeropad3d", "constantpad1d", "constantpad2d", "constantpad3d"):
            return self._add(node, *operands, module.value)
        if kind == "pad":
            mode, value = (args[i] if len(args) > i else kwargs.get(k) for i, k in ((2, "mode"), (3, "value")))
            return self._add(node, *operands, value if mode in (None, "constant") else 0)
        if MULTIPLIES.fullmatch(kind):
            return self._multiply([self.values[n] for n in operands])
        divisor_moves = any(self.values[n].degree.any() for n in operands[1:]) or not isinstance(args[0], fx.Node)
        if DIVIDES.fullmatch(kind) and not (divisor_moves or kwargs.get("rounding_mode")):
            return x
        power = 2 if kind == "square" else args[1] if kind == "pow" else None
        if isinstance(power, (int, float)) and power > 0:
            return Value(power * x.degree, x.fixed)
        raise _not_homogeneous(node, kind)

    def _argument(self, node: fx.Node, slot: int, name: str) -> Value | None:
        if node.op == "call_module" and name != "input":
            tensor = getattr(self.model.get_submodule(str(node.target)), name, None)
            return None if tensor is None else self._parameter(tensor)
        argument = node.args[slot] if slot < len(node.args) else node.kwargs.get(name)
        return self.values[argument] if isinstance(argument, fx.Node) else None

    def _parameter(self, tensor: Any) -> Value:
        degree, k = self.zero.copy(), self.index.get(id(tensor))
        if k is not None:
            degree[k] = 1.0
        return Value(degree, True)

    def _multiply(self, factors: list[Value]) -> Value:
        for factor in factors:
            if factor.fixed:
                self.weights.update(np.flatnonzero(factor.degree).tolist())
        return Value(np.sum([f.degree for f in factors], axis=0), all(f.fixed for f in factors))

    def _normalize(self, node: fx.Node, kind: str, x: Value) -> Value:
        self.norms[node] = path = str(node.target) if node.op == "call_module" else ""
        if path:  # called twice it still has one eps and one running mean
            first = self.norm_inputs.setdefault(path, x.degree)
            self._equate(node, "all its inputs must scale alike", Value(first, False), x)
        else:
            self._equate(node, "its input must not scale, as its eps is a constant", x, self.still)
        slot = 3 if kind in ("batchnorm", "instancenorm") else 2
        weight, bias = self._argument(node, slot, "weight"), self._argument(node, slot + 1, "bias")
        out = self._multiply([weight or self.still, Value(self.zero, False)])
        self._equate(node, "its bias must scale like its weight", bias or out, out)
        return out

    def _add(self, node: fx.Node, *terms: Any) -> Value:
        """Terms must scale alike; a nonzero constant does not scale, and zero has any degree."""
        values = [self.values[t] for t in terms if isinstance(t, fx.Node)]
        # an operand that scales, so that an infeasible sum is reported at the sum itself
        out = max(values, key=lambda v: (not v.fixed, bool(v.degree.any())))
        for value in values:
            self._equate(node, "its operands must scale alike", value, out)
        for number in (t for t in terms if isinstance(t, (int, float)) and t != 0):
            self._equate(node, f"the constant {number} does not scale", out, self.still)
        return out

    def _equate(self, node: fx.Node, why: str, left: Value, right: Value) -> None:
        row = left.degree - right.degree
        if row.any():
            self.equations.append(Equation(f"{where(node)}: {why}", row))

    def rows(self, equations: list[Equation]) -> Array:
        """A of A lambda = (1, 0, ..., 0), [1 + len(equations), K]: the output first, its degree is 1."""
        return np.array([self.values[self.result].degree, *(e.row for e in equations)])

    def reach(self, stop: set[str]) -> set[int]:
        """Indices of the parameters that reach the output if the norms in ``stop`` block their input."""
        found: set[int] = set()
        alive = {self.result}
        for node in reversed(self.graph.nodes):
            if node in alive:
                if node.op == "get_attr":
                    found.update(np.flatnonzero(self.values[node].degree).tolist())
                if node.op == "call_module":
                    found.update(self.index[id(p)] for p in self.model.get_submodule(str(node.target)).parameters())
                alive.update(node.all_input_nodes[1 if self.norms.get(node) in stop else 0 :])
        return found


def _kind(node: fx.Node) -> str:
    """The name of an operation as the tables above write it; attributes of tensors start with a dot."""
    if node.op == "call_module":
        return _module_class(node).lower()
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f".{node.args[1]}".lower() if name == "getattr" else name.replace("_", "").lower()


def _module_class(node: fx.Node) -> str:
    return str(list(node.meta["nn_module_stack"].values())[-1][1].__name__)


def _is_torch(node: fx.Node) -> bool:
    home = getattr(node.target, "__module__", None) or "torch"
    return node.op != "call_function" or home.split(".")[0] in ("torch", "_operator", "builtins")


def _operands(node: fx.Node) -> list[fx.Node]:
    """Tensor arguments, lists included; a tensor that occurs twice counts twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def where(node: fx.Node) -> str:
    """Module path or function call of a node, for messages."""
    if node.op == "call_module":
        return f"module {str(node.target)!r} ({_module_class(node)})"
    if node.op in ("placeholder", "get_attr"):
        return repr(str(node.target))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = getattr(node.target, "__name__", node.target)
    return f"call {name!r}" + (f" in module {stack[-1][0]!r}" if stack else "")


def _not_homogeneous(node: fx.Node, kind: str) -> UserError:
    certain = "is not homogeneous: no rates exist"
    verdict = certain if CURVED.fullmatch(kind) else "is not known to be homogeneous: no rates can be found"
    return UserError(f"{where(node)} {verdict}", "use ReLU or LeakyReLU, linear layers, pooling and normalization")
