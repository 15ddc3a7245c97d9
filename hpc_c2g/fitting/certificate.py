"""Certificate: distance of a trained classifier from a KKT point on its training data, a lower bound for any generator.

With m_ij the pairwise margins of the n training samples and a = -log(smallest margin), so that theta(a) has margin 1,

    certificate = min over mu >= 0 of   sum_k || c_k e^(a lambda_k) theta_k - e^(a (1 - lambda_k)) sum_ij mu_ij grad_k m_ij ||^2
                                      / sum_k || c_k e^(a lambda_k) theta_k ||^2,

the smallest L_stat that the training data can reach. Like L_stat it is a ratio of *squared* norms: the digits classifier
64-500-10 at margin 300 has 0.04, where the ratio of norms is 0.2. It is a non-negative least-squares problem in M = n (C - 1)
multipliers, in float64 with exact ReLU gradients: with J the scaled gradients ``[M, P]`` and b the left side ``[P]`` the numerator is
b b - 2 mu J b + mu J J^T mu, and the solver needs only products with J J^T ``[M, M]``. A BatchNorm has the statistics
of all n samples in the graph, as in training: with frozen ones such nets are not stationary. For diagnosis only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.func import functional_call, jvp

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.errors import UserError
from hpc_c2g.fitting.coupled_product import coupled_product
from hpc_c2g.fitting.equations import count_equations
from hpc_c2g.fitting.gram import CHUNK, margin_gram, spans
from hpc_c2g.kkt.margins import other_classes, pairwise_margins, smallest_margins
from hpc_c2g.kkt.normalization import BatchStatistics, couples, replace_norms, use_statistics
from hpc_c2g.kkt.options import AUTO
from hpc_c2g.kkt.stationarity import kkt_sum, left_side, residual, residual_weights, resolve_form, squared_norms

ITERATIONS = 20_000  # a few hundred are typical
RESTARTS = 10  # starts of the search, each from the end of the last; one is typical
NEAR = 1e-5  # duality gap at which the solver stops for coupled samples
ENOUGH = 2e-4  # largest accepted duality gap; certificates are reported to three decimals
LIKELY, UNLIKELY = 0.1, 0.3  # certificates below and above which a generator is likely, and unlikely, to work


@dataclass(frozen=True)
class Certificate:
    """Distance of a classifier from a KKT point on its training data.

    Attributes:
        relative_residual: The certificate, sum_k ||r_k||^2 / sum_k ||c_k e^(a lambda_k) theta_k||^2, in 0..1.
        per_tensor: ||r_k||^2 / ||c_k e^(a lambda_k) theta_k||^2; where that is zero, ||r_k||^2 over the sum of all tensors' left sides.
        support_samples: Number of samples with a multiplier above 1e-6 of the largest.
        samples: n, the number of samples.
        multipliers: The minimizing mu, float64 ``[n, C]``, zero at j = y_i.
        min_margin: Smallest m_ij at the given theta.
        accuracy: Fraction of samples with positive margins only.
        weighted_margin: rho = sum mu e^a m / sum mu, 1 at a KKT point; nan where every mu is zero.
        equations: Number of distinct non-constant activation patterns of the first rectifier's units over the data, times the input
            dimension, at most the number of parameters. Without a rectifier, the number of parameters of the first layer.
        unknowns: Support samples times (input dimension + C - 1).
        form: Form of the left side.
        alpha: Value of a at which everything was evaluated.
        statistics: Statistics of the BatchNorms, ``batch`` or ``frozen``; ``frozen`` without a BatchNorm.
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
        """Share of each sample in the multipliers, sum_j mu_ij over the sum of all; 0 if all multipliers are 0."""
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
    """Compute the certificate of ``bundle`` on its training data, on the device of ``samples``.

    Args:
        bundle: Bundle of the classifier.
        samples: Normalized inputs ``[n, *S]``: the whole training set of the classifier.
        labels: int64 ``[n]``.
        rates: lambda_k per parameter.
        form: Form of the left side, see ``left_side``.
        alpha: Value of a; by default -log(smallest margin), or 0 if that margin is not positive. The residual of uniform rates does not
            depend on it; that of other rates depends on it strongly.
        statistics: ``batch`` puts the statistics of all ``samples`` into the graph of every BatchNorm, ``frozen`` uses the running ones,
            ``auto`` is ``batch``.

    Raises:
        UserError: the data do not fit the classifier, the rates do not name its parameters, the left side is zero, a BatchNorm has no
            running statistics, or the solver does not converge.
    """
    _check(bundle, samples, labels, rates)
    model = copy.deepcopy(bundle.model).to(samples.device, torch.float64)
    theta = {k: p.detach() for k, p in model.named_parameters()}
    x, y = samples.detach().double(), labels.to(samples.device)
    norms = replace_norms(model) if couples(model, statistics) else []
    size = len(x) if norms else CHUNK  # coupled samples cannot be split
    batches = spans(len(x), size)

    def phi(parameters: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        with use_statistics(norms, BatchStatistics() if norms else None):
            logits: Tensor = functional_call(model, dict(parameters), (batch,))
        return logits

    with torch.no_grad():
        margins = torch.cat([pairwise_margins(phi(theta, x[s]), y[s]) for s in batches])
    smallest = smallest_margins(margins, y)
    min_margin = float(smallest.min())
    if alpha is None:
        alpha = -math.log(min_margin) if min_margin > 0 else 0.0
    c = left_side(rates, form)
    weight = next(iter(residual_weights(squared_norms(theta), rates, c, alpha).values()))
    left = {k: c[k] * math.exp(alpha * rates[k]) * t for k, t in theta.items()}
    scales = {k: math.exp(alpha * (1 - rates[k])) for k in theta}
    tangent = {k: scales[k] * t for k, t in left.items()}
    logits = [jvp(lambda t, s=s: phi(t, x[s]), (theta,), (tangent,))[1] for s in batches]
    pairs = other_classes(y, margins.shape[1])
    multipliers = torch.zeros_like(margins)
    products = pairwise_margins(torch.cat(logits), y)[pairs]
    if norms:
        multipliers[pairs] = _solve(coupled_product(phi, theta, scales, x, y), products, 1 / weight)
    else:
        gram = margin_gram(model, scales, x, y)
        multipliers[pairs] = _solve(gram.mv, products, 1 / weight, gram.diagonal())
    sums = [kkt_sum(phi, theta, x[s], y[s], multipliers[s])[1] for s in batches]
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
    """Return a one-line verdict: is a generator likely to work, and why."""
    accuracy, margin, residual = certificate.accuracy, certificate.min_margin, certificate.relative_residual
    if accuracy < 1 or margin <= 0:
        state = f"{accuracy:.1%} of the training samples are right, the smallest margin is {margin:.3g}"
        return f"not converged: {state}; fit the classifier longer, until every margin is large"
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


def _solve(gram: Callable[[Tensor], Tensor], products: Tensor, square: float, squares: Tensor | None = None) -> Tensor:
    """argmin over mu >= 0 of ||b - J^T mu||^2 from mu -> J J^T mu, J b ``[M]`` and b b; ``squares`` of J's rows, if known, scale mu.

    L-BFGS-B needs a few hundred products with any J; active-set solvers need a factor of J J^T and a step per multiplier. With mu scaled
    so that rows are as long as b, and g the gradient of half the certificate at mu, convexity bounds the possible improvement over all
    points with a sum of at most s = max(2 sum mu, 1) by the gap 2 (<g, mu> + s max(0, -min g)). Products that need passes through a net
    stop at a gap of ``NEAR``; products with a matrix run to convergence. A search whose line search drowns in rounding starts again
    from where it ended.
    """
    enough = NEAR if squares is None else 0.0
    if squares is None:
        squares = (products / math.sqrt(square)).square().amax().expand_as(products)  # no row is shorter than along b
    size = squares.clamp(min=0).sqrt()
    scale = torch.where(size > 0, math.sqrt(square) / size, 0.0)  # rows and right side of the same norm
    right = (scale * products / square).cpu().numpy()
    gradients: dict[bytes, Any] = {}  # gradient at the last point, which the callback may receive

    def gradient_at(values: Any) -> Any:
        gradient = scale * gram(scale * torch.from_numpy(values).to(products)) / square
        return gradient.cpu().numpy() - right

    def gap(values: Any, gradient: Any) -> float:
        return 2 * float(gradient @ values + max(2 * values.sum(), 1.0) * max(0.0, -gradient.min()))

    def stop_when_near(values: Any) -> None:
        gradient = gradients.get(values.tobytes())
        if gradient is not None and gap(values, gradient) < enough:
            raise StopIteration

    point = torch.zeros(len(products), dtype=torch.float64).numpy()
    slope = gradient_at(point)
    for _ in range(RESTARTS):

        def gain_and_gradient(values: Any, point: Any = point, slope: Any = slope) -> tuple[float, Any]:
            gradient = gradient_at(values)
            gradients.clear()
            gradients[values.tobytes()] = gradient
            # a quadratic's exact difference from the last start: differences of the value itself drown in rounding near the minimum
            return 0.5 * float((values - point) @ (gradient + slope)), gradient

        point = minimize(
            gain_and_gradient,
            point,
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * len(point),
            callback=stop_when_near,
            options={"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "maxcor": 30, "ftol": 0, "gtol": 1e-9},
        ).x
        slope = gradient_at(point)
        if gap(point, slope) < ENOUGH:
            return torch.from_numpy(point).to(products) * scale
    raise UserError(f"the certificate of {len(products)} margins did not converge", "give fewer samples")
