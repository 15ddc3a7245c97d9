"""Rates lambda_k of a quasi-homogeneous classifier, read off its architecture.

    Phi(x; {e^(a lambda_k) theta_k}) = e^a Phi(x; theta)   for all a,        lambda_k >= 0

Every activation scales like e^(a d). Its degree d is a linear form in the rates: a linear layer adds the rate of its
weight, ReLU and pooling keep d, a normalisation replaces d by the rate of its affine weight. Biases, sums and the
output (d = 1) give linear equations A lambda = b. Of their non-negative solutions the one nearest to uniform is taken,

    min_u sum_{k in weights} (lambda_k - u)^2,   0 for what is never used,

which is 1/L for every tensor of a homogeneous net with L layers.
"""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import null_space
from scipy.optimize import linprog
from torch import Tensor, fx, nn

from hpc_c2g.errors import C2GError

Array = NDArray[np.float64]
ZERO = 1e-9  # rates and degrees are sums of small fractions: anything below is round-off

# What each operation does to the degree, for modules, functions and methods alike: names are compared in lower case
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
NORMALISES = re.compile(r"(sync)?(batch|instance)norm([123]d)?|(layer|group|rms)norm")
SIZES = re.compile(r"size|dim|numel|ndimension|\..*")
CURVED = re.compile(
    r"tanh|(log)?sigmoid|gelu|silu|[sc]?elu|mish|soft(plus|sign)|hard(swish|sigmoid|tanh)|relu6|glu|(log)?softmax(2d)?"
    r"|softmin|exp|log|sin|cos|multiheadattention|scaleddotproductattention|transformer.*"
)


@dataclass(frozen=True)
class Rates:
    """Lambda: how every tensor of a classifier scales when its output scales by e^a.

    Attributes:
        parameters: lambda_k >= 0 per parameter name; theta_k scales by e^(a lambda_k).
        statistics: the same per BatchNorm buffer: the running mean scales like its input, the variance twice that.
        scale_invariant: parameters that reach the output only through the input of a normalisation: scaling them (all
            biases along) leaves Phi unchanged, so their rate is 0.
        norm_degrees: degree d of the input of each normalisation module; its eps scales by e^(2 a d). Zero wherever a
            solution with zero exists, as a real eps does not scale.
    """

    parameters: dict[str, float]
    statistics: dict[str, float]
    scale_invariant: frozenset[str]
    norm_degrees: dict[str, float]


class _Value(NamedTuple):
    degree: Array  # [K], coefficients over the rates
    fixed: bool  # made of parameters and constants alone, whatever the input


class _Equation(NamedTuple):
    culprit: str  # whom to name when it cannot hold
    row: Array  # [K], row @ lambda = 0


class _Degrees:
    """Walks a traced graph once, in order of execution, and collects the equations between the rates."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.names = [name for name, _ in model.named_parameters()]
        # by identity: a tensor tied under two names is one variable
        self.index = {id(p): k for k, p in enumerate(model.parameters())}
        self.zero: Array = np.zeros(len(self.names))
        self.still = _Value(self.zero, True)  # what does not scale: numbers, buffers, sizes
        self.values: dict[fx.Node, _Value] = {}
        self.equations: list[_Equation] = []
        self.norms: dict[fx.Node, str] = {}  # module path, empty for a function
        self.norm_inputs: dict[str, Array] = {}  # by module path
        self.weights: set[int] = set()  # parameters that multiply something
        for node in graph.nodes:
            self.values[node] = self._read(node)

    def _read(self, node: fx.Node) -> _Value:
        if node.op == "placeholder":
            return _Value(self.zero, False)
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return self._parameter(getattr(self.model.get_submodule(path), name))
        if node.op == "output":
            logits = node.args[0]
            if not isinstance(logits, fx.Node):
                kind = type(logits).__name__
                raise C2GError(f"the classifier returns a {kind}, not a tensor", "return the logits alone")
            self.result = logits
            return self.values[logits]
        kind, args, kwargs, operands = _kind(node), node.args, node.kwargs, _operands(node)
        x = self._argument(node, 0, "input") or self.still
        moving = any(self.values[n].degree.any() for n in operands)
        module: Any = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        own = {name for name, _ in module.named_parameters()} if module is not None else set()
        if NORMALISES.fullmatch(kind) and _is_torch(node) and own <= {"weight", "bias"}:
            return self._normalise(node, kind, x)
        if not (moving or own) or SIZES.fullmatch(kind):  # whatever it does to sizes or to the raw input
            return _Value(self.zero, all(self.values[n].fixed for n in operands))
        # functions of the user's may bear any name, and a parametrised or pruned module has other parameters
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
            return _Value(power * x.degree, x.fixed)
        raise _not_homogeneous(node, kind)

    def _argument(self, node: fx.Node, slot: int, name: str) -> _Value | None:
        if node.op == "call_module" and name != "input":
            tensor = getattr(self.model.get_submodule(str(node.target)), name, None)
            return None if tensor is None else self._parameter(tensor)
        argument = node.args[slot] if slot < len(node.args) else node.kwargs.get(name)
        return self.values[argument] if isinstance(argument, fx.Node) else None

    def _parameter(self, tensor: Any) -> _Value:
        degree, k = self.zero.copy(), self.index.get(id(tensor))
        if k is not None:
            degree[k] = 1.0
        return _Value(degree, True)

    def _multiply(self, factors: list[_Value]) -> _Value:
        for factor in factors:
            if factor.fixed:
                self.weights.update(np.flatnonzero(factor.degree).tolist())
        return _Value(np.sum([f.degree for f in factors], axis=0), all(f.fixed for f in factors))

    def _normalise(self, node: fx.Node, kind: str, x: _Value) -> _Value:
        self.norms[node] = path = str(node.target) if node.op == "call_module" else ""
        if path:  # called twice it still has one eps and one running mean
            first = self.norm_inputs.setdefault(path, x.degree)
            self._equate(node, "all its inputs must scale alike", _Value(first, False), x)
        else:
            self._equate(node, "its input must not scale, as its eps is a constant", x, self.still)
        slot = 3 if kind in ("batchnorm", "instancenorm") else 2
        weight, bias = self._argument(node, slot, "weight"), self._argument(node, slot + 1, "bias")
        out = self._multiply([weight or self.still, _Value(self.zero, False)])
        self._equate(node, "its bias must scale like its weight", bias or out, out)
        return out

    def _add(self, node: fx.Node, *terms: Any) -> _Value:
        """Terms must scale alike; a number other than zero does not scale, and zero scales as one likes."""
        values = [self.values[t] for t in terms if isinstance(t, fx.Node)]
        # one that scales, so that an infeasible sum is found at the sum and not further on
        out = max(values, key=lambda v: (not v.fixed, bool(v.degree.any())))
        for value in values:
            self._equate(node, "its operands must scale alike", value, out)
        for number in (t for t in terms if isinstance(t, (int, float)) and t != 0):
            self._equate(node, f"the constant {number} does not scale", out, self.still)
        return out

    def _equate(self, node: fx.Node, why: str, left: _Value, right: _Value) -> None:
        row = left.degree - right.degree
        if row.any():
            self.equations.append(_Equation(f"{_where(node)}: {why}", row))

    def rows(self, equations: list[_Equation]) -> Array:
        """A of A lambda = (1, 0, ..., 0), [1 + len(equations), K]: the output first, its degree is 1."""
        return np.array([self.values[self.result].degree, *(e.row for e in equations)])

    def reach(self, stop: set[str]) -> set[int]:
        """Indices of the parameters that reach the output when the norms in ``stop`` let no input through."""
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


def find_rates(model: nn.Module) -> Rates:
    """The non-negative rates nearest to uniform, for every parameter, frozen or not.

    Raises:
        C2GError: the model cannot be traced, holds something that is not homogeneous, or its equations contradict each
            other; the message names the module or the call.
    """
    if not list(model.parameters()):
        raise C2GError("the classifier has no parameters", "give a trained network")
    try:
        model = copy.deepcopy(model).eval()
        arguments = inspect.signature(model.forward).parameters.values()
        defaults = {p.name: p.default for p in arguments if p.default is not p.empty}  # flags are no tensors
        graph = fx.Tracer().trace(model, concrete_args=defaults or None)
    except Exception as error:  # any failure of a user's forward on symbolic values
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = "remove control flow that depends on the input"
        raise C2GError(f"the classifier cannot be traced by torch.fx: {line}", mend) from error
    degrees = _Degrees(model, graph)
    names, norms = degrees.names, degrees.norm_inputs
    rows = degrees.rows(degrees.equations)
    vertex = _feasible(rows, np.sum([degrees.zero, *norms.values()], axis=0))
    if vertex is None:
        raise _contradiction(degrees)
    # a norm's eps does not scale, so its input should not either: the linear program above made as few scale as it can
    pinned = {path for path, row in norms.items() if row @ vertex < 1e-6}
    A = np.array([*rows, *(row for path, row in norms.items() if path in pinned)])
    direct = degrees.reach({"", *pinned})
    spread = sorted(degrees.weights & direct)
    C = np.zeros((len(spread), len(names)))
    C[:, spread] = np.eye(len(spread)) - 1 / max(len(spread), 1)  # C lambda = (lambda_k - mean) over the weights
    solution = _least_squares(C, A, np.eye(1, len(A))[0], vertex)
    solution = np.array([max(_snap(r), 0.0) for r in solution.tolist()])

    norm_degrees = {path: _snap(float(row @ solution)) for path, row in norms.items()}
    statistics = {
        f"{path}.{name}": factor * degree
        for path, degree in norm_degrees.items()
        for name, factor in (("running_mean", 1), ("running_var", 2))
        if isinstance(getattr(model.get_submodule(path), name, None), Tensor)
    }
    invariant = frozenset(names[k] for k in degrees.reach(set()) - direct if solution[k] == 0)
    return Rates(dict(zip(names, solution.tolist(), strict=True)), statistics, invariant, norm_degrees)


def verify_rates(
    model: nn.Module,
    rates: Rates,
    input_shape: tuple[int, ...],
    *,
    scales: tuple[float, ...] = (-0.7, 0.5),
    seed: int = 0,
) -> float:
    """Largest |Phi(x; psi_a theta) - e^a Phi(x; theta)| / max |e^a Phi(x; theta)| over ``scales``, in float64.

    Args:
        model: left as it is; a copy in eval mode is scaled.
        rates: what ``find_rates`` gave; right ones stay below 1e-9.
        input_shape: ``[*S]`` of one sample.
        scales: the values of a.
        seed: of the four random inputs.
    """
    base = copy.deepcopy(model).cpu().double().eval()
    x = torch.randn(4, *input_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    worst = 0.0
    with torch.no_grad():
        logits = base(x)
        for a in scales:
            scaled = copy.deepcopy(base)
            exponents = rates.parameters | rates.statistics
            for name, tensor in (*scaled.named_parameters(), *scaled.named_buffers()):
                if name in exponents:
                    tensor.mul_(np.exp(a * exponents[name]))
            for path, degree in rates.norm_degrees.items():
                norm: Any = scaled.get_submodule(path)
                if norm.eps is not None:
                    norm.eps *= np.exp(2 * a * degree)
            expected = np.exp(a) * logits
            error = (scaled(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
            worst = max(worst, float(error.nan_to_num(nan=np.inf)))
    return worst


def _feasible(rows: Array, cost: Array) -> Array | None:
    """Some lambda >= 0 of least cost @ lambda with rows @ lambda = (1, 0, ..., 0), or None."""
    result = linprog(cost, A_eq=rows, b_eq=np.eye(1, len(rows))[0], bounds=(0, None), method="highs")
    return np.maximum(result.x, 0.0) if result.status == 0 else None


def _contradiction(degrees: _Degrees) -> C2GError:
    """Names a smallest set of equations that cannot hold together, found by deleting all that can be spared."""
    kept = list(degrees.equations)
    for equation in degrees.equations:
        rest = [e for e in kept if e is not equation]
        if _feasible(degrees.rows(rest), degrees.zero) is None:
            kept = rest
    culprits = dict.fromkeys([*(e.culprit for e in kept), f"{_where(degrees.result)}: the output must have degree 1"])
    return C2GError(
        f"no rates exist, these cannot hold together: {'; '.join(culprits)}",
        "remove that bias or constant, give the shortcut a weight of its own, or end with a linear layer",
    )


def _least_squares(C: Array, A: Array, b: Array, x: Array) -> Array:
    """argmin ||C x||^2 subject to A x = b, x >= 0: primal active set from a feasible ``x`` [K], exact to round-off.

    Coordinates that nothing determines stay 0: each step takes the solution of least norm.
    """
    active: list[int] = []
    for _ in range(20 * x.size + 20):
        free = np.setdiff1d(np.arange(x.size), active)
        particular = np.linalg.pinv(A[:, free], rcond=ZERO) @ b
        N = null_space(A[:, free], rcond=ZERO)
        target = np.zeros_like(x)
        directions = C[:, free] @ N
        directions[np.abs(directions) < ZERO] = 0.0  # all of it may be round-off, which a relative cutoff would invert
        target[free] = particular - N @ (np.linalg.pinv(directions, rcond=ZERO) @ (C[:, free] @ particular))
        blocking = free[target[free] < -ZERO]
        if blocking.size:
            steps = x[blocking] / (x[blocking] - target[blocking])
            first = int(np.argmin(steps))
            x = np.maximum(x + steps[first] * (target - x), 0.0)
            x[blocking[first]] = 0.0
            active.append(int(blocking[first]))
            continue
        x = target
        # multipliers mu of x_active >= 0 from the gradient C^T C x = A^T nu + mu
        gradient = C.T @ (C @ x)
        nu = np.linalg.pinv(A[:, free].T, rcond=ZERO) @ gradient[free]
        mu = (gradient - A.T @ nu)[active]
        if not active or mu.min() > -ZERO:
            break
        active.pop(int(np.argmin(mu)))
    return x


def _snap(value: float) -> float:
    """The simple fraction that round-off hides, so that equal rates compare equal."""
    simple = float(Fraction(value).limit_denominator(10_000))
    return simple if abs(simple - value) < 1e-12 else value


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
    """Tensors among the arguments, lists included, one that occurs twice counted twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _where(node: fx.Node) -> str:
    """Module path or call, as a user finds it in the code."""
    if node.op == "call_module":
        return f"module {str(node.target)!r} ({_module_class(node)})"
    if node.op in ("placeholder", "get_attr"):
        return repr(str(node.target))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = getattr(node.target, "__name__", node.target)
    return f"call {name!r}" + (f" in module {stack[-1][0]!r}" if stack else "")


def _not_homogeneous(node: fx.Node, kind: str) -> C2GError:
    certain = "is not homogeneous: no rates exist"
    verdict = certain if CURVED.fullmatch(kind) else "is not known to be homogeneous: no rates can be found"
    return C2GError(f"{_where(node)} {verdict}", "use ReLU or LeakyReLU, linear layers, pooling and normalisation")
