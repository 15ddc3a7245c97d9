"""How far a trained classifier is from a KKT point, given its training data: whether any generator can work.

With m_ij the pairwise margins of the n training samples and a = -log(smallest margin), so that theta(a) has margin 1,

    certificate = min over mu >= 0 of   sum_k || c_k e^(a lambda_k) theta_k - e^(a (1 - lambda_k)) sum_ij mu_ij grad_k m_ij ||^2
                                      / sum_k || c_k e^(a lambda_k) theta_k ||^2,

the smallest L_stat that the training data themselves reach. Like L_stat it is a ratio of *squared* norms: the digits classifier
64-500-10 at margin 300 has 0.04, where the ratio of norms is 0.2. It is a non-negative least-squares problem in M = n (C - 1)
multipliers, in float64 with exact ReLU gradients: with J the scaled gradients ``[M, P]`` and b the left side ``[P]`` the numerator is
b b - 2 mu J b + mu J J^T mu, and the solver needs products with J J^T ``[M, M]`` alone. A BatchNorm has the statistics
of all n samples in the graph, as in training: with frozen ones such nets are not stationary. For diagnosis alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.errors import UserError
from hpc_c2g.fitting.coupled_product import coupled_product
from hpc_c2g.fitting.equations import count_equations
from hpc_c2g.kkt.margins import other_classes, pairwise_margins, smallest_margins
from hpc_c2g.kkt.normalization import BatchStatistics, couples, replace_norms, use_statistics
from hpc_c2g.kkt.options import AUTO
from hpc_c2g.kkt.stationarity import kkt_sum, left_side, residual, residual_weights, resolve_form, squared_norms

MEMORY = 2 * 10**9  # bytes of per-row gradients, with their temporaries, held at a time
CHUNK = 256  # samples per forward pass
ITERATIONS = 20_000  # a few hundred do
NEAR = 1e-5  # what a certificate of coupled samples may lack
ENOUGH = 2e-4  # what the certificate may lack, which is told to three decimals
LIKELY, UNLIKELY = 0.1, 0.3  # certificates below and above which a generator is likely, and unlikely, to work
Factors = dict[tuple[str, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Certificate:
    """Distance of a classifier from a KKT point on its training data.

    Attributes:
        relative_residual: the certificate, sum_k ||r_k||^2 / sum_k ||c_k e^(a lambda_k) theta_k||^2, in 0..1.
        per_tensor: ||r_k||^2 / ||c_k e^(a lambda_k) theta_k||^2; where that is zero, ||r_k||^2 over the sum of all tensors' left sides.
        support_samples: samples with a multiplier above 1e-6 of the largest.
        samples: n.
        multipliers: the minimizing mu, float64 ``[n, C]``, zero at j = y_i.
        min_margin: smallest m_ij at the given theta.
        accuracy: share of samples whose every margin is positive.
        weighted_margin: rho = sum mu e^a m / sum mu, 1 at a KKT point; nan where every mu is zero.
        equations: distinct non-constant activation patterns of the first rectifier's units over the data, times the input dimension, at
            most the number of parameters. Without a rectifier, the number of parameters of the first layer.
        unknowns: support samples times (input dimension + C - 1).
        form: of the left side.
        alpha: the a at which all of it was evaluated.
        statistics: of the BatchNorms, ``batch`` or ``frozen``; without any, ``frozen``.
    """

    relative_residual: float
    per_tensor: dict[str, float]
    support_samples: int
    samples: int
    multipliers: Tensor
    min_margin: float
    accuracy: float
    weighted_margin: float
    equations: int
    unknowns: int
    form: str
    alpha: float
    statistics: str = "frozen"

    @property
    def shares(self) -> list[float]:
        """Of each sample in all multipliers, sum_j mu_ij over the sum of all; 0 where all are."""
        own = self.multipliers.sum(1)
        return [float(share) for share in own / own.sum().clamp_min(torch.finfo(own.dtype).tiny)]


def certify(
    bundle: Bundle,
    samples: Tensor,
    labels: Tensor,
    rates: Mapping[str, float],
    form: str = AUTO,
    alpha: float | None = None,
    statistics: str = "auto",
) -> Certificate:
    """The certificate of ``bundle`` on its own training data, computed on the device of ``samples``.

    Args:
        bundle: the classifier.
        samples: normalized inputs ``[n, *S]``, all that the classifier was fitted to.
        labels: int64 ``[n]``.
        rates: lambda_k per parameter.
        form: of the left side, see ``left_side``.
        alpha: a; by default -log(smallest margin), or 0 where that margin is not positive. The residual of uniform rates does not
            depend on it, that of others does, strongly.
        statistics: ``batch`` puts those of all ``samples`` into the graph of every BatchNorm, ``frozen`` takes the running ones, ``auto``
            is ``batch``.

    Raises:
        UserError: data that do not fit the classifier, rates that do not name its parameters, a left side of zero, no convergence, a
            BatchNorm without running statistics.
    """
    _check(bundle, samples, labels, rates)
    model = copy.deepcopy(bundle.model).to(samples.device, torch.float64)
    theta = {k: p.detach() for k, p in model.named_parameters()}
    x, y = samples.detach().double(), labels.to(samples.device)
    norms = replace_norms(model) if couples(model, statistics) else []
    size = len(x) if norms else CHUNK  # coupled samples cannot be cut
    spans = _spans(len(x), size)

    def phi(parameters: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        with use_statistics(norms, BatchStatistics() if norms else None):
            logits: Tensor = functional_call(model, dict(parameters), (batch,))
        return logits

    with torch.no_grad():
        margins = torch.cat([pairwise_margins(phi(theta, x[s]), y[s]) for s in spans])
    smallest = smallest_margins(margins, y)
    min_margin = float(smallest.min())
    if alpha is None:
        alpha = -math.log(min_margin) if min_margin > 0 else 0.0
    c = left_side(rates, form)
    weight = next(iter(residual_weights(squared_norms(theta), rates, c, alpha).values()))
    left = {k: c[k] * math.exp(alpha * rates[k]) * t for k, t in theta.items()}
    scales = {k: math.exp(alpha * (1 - rates[k])) for k in theta}
    tangent = {k: scales[k] * t for k, t in left.items()}
    logits = [jvp(lambda t, s=s: phi(t, x[s]), (theta,), (tangent,))[1] for s in spans]
    pairs = other_classes(y, margins.shape[1])
    multipliers = torch.zeros_like(margins)
    products = pairwise_margins(torch.cat(logits), y)[pairs]
    if norms:
        multipliers[pairs] = _solve(coupled_product(phi, theta, scales, x, y), products, 1 / weight)
    else:
        gram = margin_gram(model, scales, x, y)
        multipliers[pairs] = _solve(gram.mv, products, 1 / weight, gram.diagonal())
    sums = [kkt_sum(phi, theta, x[s], y[s], multipliers[s])[1] for s in spans]
    G = {k: torch.stack([g[k] for g in sums]).sum(0) for k in theta}
    squares = {k: float(r.square().sum()) for k, r in residual(theta, G, rates, c, alpha).items()}
    own = {k: float(t.square().sum()) for k, t in left.items()}
    support = int((multipliers.amax(1) > 1e-6 * multipliers.max()).sum())
    mass, value = float(multipliers.sum()), float((multipliers * margins).sum())
    with use_statistics(norms, BatchStatistics() if norms else None):
        equations = count_equations(model, x, size)
    return Certificate(
        relative_residual=weight * sum(squares.values()),
        per_tensor={k: s / own[k] if own[k] > 0 else weight * s for k, s in squares.items()},
        support_samples=support,
        samples=len(y),
        multipliers=multipliers,
        min_margin=min_margin,
        accuracy=float((smallest > 0).double().mean()),
        weighted_margin=math.exp(alpha) * value / mass if mass > 0 else math.nan,
        equations=equations,
        unknowns=support * (x[0].numel() + margins.shape[1] - 1),
        form=resolve_form(rates, form),
        alpha=alpha,
        statistics="batch" if norms else "frozen",
    )


def verdict(certificate: Certificate) -> str:
    """Whether a generator is likely to work, and why, in plain words."""
    accuracy, margin, residual = certificate.accuracy, certificate.min_margin, certificate.relative_residual
    if accuracy < 1 or margin <= 0:
        state = f"{accuracy:.1%} of the training samples are right, the smallest margin is {margin:.3g}"
        return f"not converged: {state}; fit the classifier on until every margin is large"
    worst = max(certificate.per_tensor.items(), key=lambda item: item[1])[0]
    text = f"the training data leave {residual:.3f} of the weights unexplained"
    if residual < LIKELY:
        text = f"likely to work: {text} (below {LIKELY})"
    elif residual <= UNLIKELY:
        text = f"doubtful: {text} ({LIKELY} to {UNLIKELY}), most of {worst}; fit the classifier to a larger margin"
    else:
        text = f"unlikely to work: {text} (above {UNLIKELY}), most of {worst}; start the fit from smaller weights"
    equations, unknowns = certificate.equations, certificate.unknowns
    if equations < unknowns:
        text += f"; warning: {equations} equations for {unknowns} unknowns, use a wider first layer or fewer samples"
    return text


def _check(bundle: Bundle, samples: Tensor, labels: Tensor, rates: Mapping[str, float]) -> None:
    classes, shape, n = len(bundle.classes), bundle.input_shape, len(samples)
    fit = n > 0 and samples.shape == (n, *shape) and labels.shape == (n,)
    if not fit or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise UserError(
            f"samples {list(samples.shape)} and labels {list(labels.shape)} do not fit {list(shape)}, {classes} classes",
            f"give samples of the shape [n, {', '.join(map(str, shape))}] and n labels in 0..{classes - 1}",
        )
    odd = sorted(rates.keys() ^ bundle.parameters.keys())
    if odd:
        raise UserError(f"rates do not match the parameters at {', '.join(odd)}", "give one rate per parameter")


def _spans(total: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, total, size)]


def _solve(gram: Callable[[Tensor], Tensor], products: Tensor, square: float, squares: Tensor | None = None) -> Tensor:
    """argmin over mu >= 0 of ||b - J^T mu||^2 from mu -> J J^T mu, J b ``[M]`` and b b; ``squares`` of J's rows, if known, scale mu.

    By L-BFGS-B, which needs some hundred products with any J; active-set solvers need a factor of J J^T, and a step per multiplier. In
    mu scaled so that rows are as long as b, no point with a sum of at most s = max(2 sum mu, 1) is better, by convexity, than one at
    which half the certificate has slope g by more than the gap 2 (<g, mu> + s max(0, -min g)): products that take passes through a net
    end at a gap of ``NEAR``, those with a matrix go on.
    """
    enough = NEAR if squares is None else 0.0
    if squares is None:
        squares = (products / math.sqrt(square)).square().amax().expand_as(products)  # no row is shorter than along b
    size = squares.clamp(min=0).sqrt()
    scale = torch.where(size > 0, math.sqrt(square) / size, 0.0)  # rows and right side of the same norm
    right = (scale * products / square).cpu().numpy()
    slopes: dict[bytes, Any] = {}  # of the last point, which the solver goes on from or leaves

    def half_square_and_slope(values: Any) -> tuple[float, Any]:
        slope = scale * gram(scale * torch.from_numpy(values).to(products)) / square
        slope = slope.cpu().numpy() - right
        slopes.clear()
        slopes[values.tobytes()] = slope
        return 0.5 * float(1 + values @ (slope - right)), slope

    def gap(values: Any, slope: Any) -> float:
        return 2 * float(slope @ values + max(2 * values.sum(), 1.0) * max(0.0, -slope.min()))

    def stop_when_near(values: Any) -> None:
        slope = slopes.get(values.tobytes())
        if slope is not None and gap(values, slope) < enough:
            raise StopIteration

    start = torch.zeros(len(products), dtype=torch.float64).numpy()
    found = minimize(
        half_square_and_slope,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * len(start),
        callback=stop_when_near,
        options={"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "maxcor": 30, "ftol": 0, "gtol": 1e-9},
    )
    slope = half_square_and_slope(found.x)[1]
    if not gap(found.x, slope) < ENOUGH:
        raise UserError(f"the certificate of {len(products)} margins did not converge", "give fewer samples")
    return torch.from_numpy(found.x).to(products) * scale


def margin_gram(model: nn.Module, scales: Mapping[str, float], x: Tensor, y: Tensor, memory: int = MEMORY) -> Tensor:
    """J J^T: sum_k s_k^2 <grad_k m_ij, grad_k m_i'j'> over all j != y_i, ``[M, M]``, rows ordered by i, then j.

    A linear layer called once on a batch of vectors a_i has grad m_ij = delta_ij a_i^T, whose inner products are <delta, delta'> <a, a'>,
    and <delta, delta'> for its bias: no gradient is built. Those of all
    other tensors are, block of rows by block of rows, the second block of each pair anew where not all fit.

    Args:
        model: in eval mode, in the dtype of ``x``.
        scales: s_k = e^(a (1 - lambda_k)) per parameter.
        x: ``[n, *S]``.
        y: labels ``[n]``.
        memory: bytes for the row gradients (at least one row is held).
    """
    theta = {k: p.detach() for k, p in model.named_parameters()}
    parts = [_linear_factors(model, theta, x[s], y[s]) for s in _spans(len(x), CHUNK)]
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

    # a quarter: two blocks, and the gradients of the second before and after they are scaled
    spans = _spans(len(rows), max(1, memory // (4 * x.element_size() * sum(t.numel() for t in rest.values()))))
    for i, one in enumerate(spans):
        first = block(one)
        gram[one, one] += first @ first.T
        for other in spans[i + 1 :]:
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
