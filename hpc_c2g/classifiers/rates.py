"""Rates lambda_k of a quasi-homogeneous classifier, read off its architecture.

    Phi(x; {e^(a lambda_k) theta_k}) = e^a Phi(x; theta)   for all a,        lambda_k >= 0

Every activation scales like e^(a d). Its degree d is a linear form in the rates: a linear layer adds the rate of its
weight, ReLU and pooling keep d, a normalization replaces d by the rate of its affine weight. Biases, sums and the
output (d = 1) give linear equations A lambda = b. Of their non-negative solutions the one nearest to uniform is taken,

    min_u sum_{k in weights} (lambda_k - u)^2,   0 for unused tensors,

which is 1/L for every tensor of a homogeneous net with L layers.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from scipy.linalg import null_space
from scipy.optimize import linprog
from torch import Tensor, fx, nn

from hpc_c2g.classifiers.degrees import ZERO, Array, Degrees, where
from hpc_c2g.errors import UserError


@dataclass(frozen=True)
class Rates:
    """Lambda: scaling exponent of every tensor of a classifier whose output scales by e^a.

    Attributes:
        parameters: lambda_k >= 0 per parameter name; theta_k scales by e^(a lambda_k).
        statistics: the same per BatchNorm buffer: the running mean scales like its input, the variance twice that.
        scale_invariant: parameters that reach the output only through the input of a normalization: scaling them (all
            biases along) leaves Phi unchanged, so their rate is 0.
        norm_degrees: degree d of the input of each normalization module; its eps scales by e^(2 a d). Zero wherever a
            solution with zero exists, as a real eps does not scale.
    """

    parameters: dict[str, float]
    statistics: dict[str, float]
    scale_invariant: frozenset[str]
    norm_degrees: dict[str, float]


def find_rates(model: nn.Module) -> Rates:
    """Find the non-negative rates nearest to uniform, for every parameter, frozen or not.

    Raises:
        UserError: the model cannot be traced, holds something that is not homogeneous, or its equations contradict each
            other; the message names the module or the call.
    """
    if not list(model.parameters()):
        raise UserError("the classifier has no parameters", "give a trained network")
    try:
        model = copy.deepcopy(model).eval()
        arguments = inspect.signature(model.forward).parameters.values()
        defaults = {p.name: p.default for p in arguments if p.default is not p.empty}  # flags are not traced
        graph = fx.Tracer().trace(model, concrete_args=defaults or None)
    except Exception as error:  # any failure of a user's forward on symbolic values
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "remove control flow that depends on the input"
        raise UserError(f"the classifier cannot be traced by torch.fx: {line}", hint) from error
    degrees = Degrees(model, graph)
    names, norms = degrees.names, degrees.norm_inputs
    rows = degrees.rows(degrees.equations)
    vertex = _feasible(rows, np.sum([degrees.zero, *norms.values()], axis=0))
    if vertex is None:
        raise _contradiction(degrees)
    # a norm's eps does not scale, so its input should not either: the linear program above minimizes how many do
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
        model: Classifier; a copy in eval mode is scaled.
        rates: Rates from ``find_rates``; correct ones give less than 1e-9.
        input_shape: ``[*S]`` of one sample.
        scales: Values of a.
        seed: Seed of the four random inputs.
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


def _contradiction(degrees: Degrees) -> UserError:
    """Error that names a minimal infeasible set of equations, found by deleting every redundant one."""
    kept = list(degrees.equations)
    for equation in degrees.equations:
        rest = [e for e in kept if e is not equation]
        if _feasible(degrees.rows(rest), degrees.zero) is None:
            kept = rest
    culprits = dict.fromkeys([*(e.culprit for e in kept), f"{where(degrees.result)}: the output must have degree 1"])
    return UserError(
        f"no rates exist, these cannot hold together: {'; '.join(culprits)}",
        "remove that bias or constant, give the shortcut a weight of its own, or end with a linear layer",
    )


def _least_squares(C: Array, A: Array, b: Array, x: Array) -> Array:
    """argmin ||C x||^2 subject to A x = b, x >= 0: primal active set from a feasible ``x`` [K], exact to round-off.

    Undetermined coordinates stay 0: each step takes the solution of least norm.
    """
    active: list[int] = []
    for _ in range(20 * x.size + 20):
        free = np.setdiff1d(np.arange(x.size), active)
        particular = np.linalg.pinv(A[:, free], rcond=ZERO) @ b
        N = null_space(A[:, free], rcond=ZERO)
        target = np.zeros_like(x)
        directions = C[:, free] @ N
        directions[np.abs(directions) < ZERO] = 0.0  # pure round-off, which a relative cutoff would invert
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
    """Round to the nearest simple fraction within round-off, so that equal rates compare equal."""
    simple = float(Fraction(value).limit_denominator(10_000))
    return simple if abs(simple - value) < 1e-12 else value
