"""Stationarity of the maximum-margin problem: G, the residual and the cotangents (pure functions).

At a KKT point c_k theta_k = sum_i sum_{j != y_i} mu_ij grad_k m_ij with mu_ij >= 0 (Lyu & Li 2020; Kunin et al. 2023). With
theta(a) = {e^(a lambda_k) theta_k} scaled so that its margin is 1, and G_k = sum mu_ij grad_k m_ij(x; theta) at the given theta,

    r_k = c_k e^(a lambda_k) theta_k - e^(a (1 - lambda_k)) G_k,        L_stat = sum_k w_k ||r_k||^2.

L_stat depends on the samples through the *sum* G alone. With v_k = dL_stat/dG_k = -2 w_k e^(a (1 - lambda_k)) r_k from the global G,

    dL/dx_i = <v, d/dx_i G>,    dL/dmu_ij = <v, grad m_ij>,

so G is summed over micro-batches (and ranks) without a graph, and the cotangents are exact micro-batch by micro-batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hpc_c2g.errors import UserError
from hpc_c2g.kkt.margins import pairwise_margins
from hpc_c2g.kkt.options import AUTO, LEFT_SIDES, WEIGHTINGS

Classifier = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(theta, x ``[B, *S]``) -> logits ``[B, C]``."""
OnReady = Callable[[str, Tensor], None]
"""Called with (name, G_k) as soon as a backward has G_k."""


def resolve_form(rates: Mapping[str, float], form: str = AUTO) -> str:
    """Resolve ``auto``: ``identity`` if all rates are positive, ``rates`` if some rate is 0.

    A tensor with rate 0 (every tensor before a normalization) has <theta_k, G_k> = 0 by Euler, so a left side c_k theta_k != 0 can
    never be met. Among the others a bias of the last layer alone has the largest rate, and next to no weight at any margin that is
    reached: ``top_rate`` would keep only that bias (digits, three layers with BatchNorm: certificate 0.73, ``rates`` 0.03).
    """
    if form != AUTO:
        return form
    return "identity" if min(rates.values()) > 0 else "rates"


def left_side(rates: Mapping[str, float], form: str) -> dict[str, float]:
    """Coefficients c_k of the left side of the stationarity condition.

    Args:
        rates: lambda_k per tensor name.
        form: ``identity`` c_k = 1 (homogeneous nets, Lyu & Li), ``rates`` c_k = lambda_k, ``top_rate`` c_k = lambda_max for the
            tensors with the largest rate and 0 for the others (Kunin et al., asymmetric bias), ``auto`` as ``resolve_form`` chooses.

    Raises:
        UserError: an unknown form.
    """
    top, form = max(rates.values()), resolve_form(rates, form)
    if form == "identity":
        return dict.fromkeys(rates, 1.0)
    if form == "rates":
        return dict(rates)
    if form == "top_rate":
        return {k: rate if math.isclose(rate, top, rel_tol=1e-9) else 0.0 for k, rate in rates.items()}
    raise UserError(f"left_side={form!r} is unknown", f"choose one of auto, {', '.join(LEFT_SIDES)}")


def scaled(tensors: Mapping[str, Tensor], alpha: float, powers: Mapping[str, float]) -> dict[str, Tensor]:
    """{e^(a power_k) tensor_k}."""
    return {k: math.exp(alpha * powers[k]) * t for k, t in tensors.items()}


def squared_norms(theta: Mapping[str, Tensor]) -> dict[str, float]:
    """||theta_k||^2."""
    return {k: float(t.square().sum()) for k, t in theta.items()}


def multiplier_scale(
    squares: Mapping[str, float], rates: Mapping[str, float], c: Mapping[str, float], alpha: float
) -> float:
    """S = <Lambda theta(a), c theta(a)> from ||theta_k||^2, by Euler the value of sum mu_ij e^a m_ij at a KKT point."""
    return sum(rates[k] * c[k] * math.exp(2 * alpha * rates[k]) * square for k, square in squares.items())


def kkt_sum(
    phi: Classifier,
    theta: Mapping[str, Tensor],
    x: Tensor,
    labels: Tensor,
    multipliers: Tensor,
    keep_graph: bool = False,
    on_ready: OnReady | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Margins and G_k = sum_ij mu_ij grad_k m_ij of one micro-batch.

    Args:
        phi: the classifier with smooth gates.
        theta: parameters, any ``requires_grad``.
        x: normalized inputs ``[B, *S]``.
        labels: ``[B]``.
        multipliers: mu ``[B, C]``, zero at j = y_i.
        keep_graph: keep the graph of both results with respect to x and mu; the results are detached otherwise.
        on_ready: hook called with (name, G_k) once the backward has computed G_k, last layers first; not for tensors that phi does not use.

    Returns:
        margins ``[B, C]`` and G, one tensor per parameter.
    """
    leaves = {k: t.detach().requires_grad_() for k, t in theta.items()}
    if on_ready is not None:
        for k, leaf in leaves.items():
            leaf.register_hook(functools.partial(on_ready, k))  # type: ignore[no-untyped-call]
    if not keep_graph:
        x, multipliers = x.detach(), multipliers.detach()
    with torch.enable_grad():
        margins = pairwise_margins(phi(leaves, x), labels)
        grads = torch.autograd.grad(
            (multipliers * margins).sum(), list(leaves.values()), create_graph=keep_graph, materialize_grads=True
        )
    return margins if keep_graph else margins.detach(), dict(zip(leaves, grads, strict=True))


def residual(
    theta: Mapping[str, Tensor],
    G: Mapping[str, Tensor],
    rates: Mapping[str, float],
    c: Mapping[str, float],
    alpha: float,
) -> dict[str, Tensor]:
    """r_k = c_k e^(a lambda_k) theta_k - e^(a (1 - lambda_k)) G_k."""
    return {
        k: (c[k] * math.exp(alpha * rates[k]) * t).sub_(G[k], alpha=math.exp(alpha * (1 - rates[k])))
        for k, t in theta.items()
    }


def residual_weights(
    squares: Mapping[str, float],
    rates: Mapping[str, float],
    c: Mapping[str, float],
    alpha: float,
    weighting: str = "relative",
    own_scale: float = 1.0,
) -> dict[str, float]:
    """w_k from ||theta_k||^2, with the total L = sum_k ||c_k theta_k(a)||^2 of the left side.

    ``relative`` is 1 / L, ``per_tensor`` 1 / (K ||c_k theta_k(a)||^2) over K tensors. A tensor without a left side (c_k = 0) has no scale
    of its own and takes 1 / L. ``scale_free`` is 1 / L except for those tensors: (||theta_k(a)||^2 / L)^p / L with p = ``own_scale``,
    which training raises from 0 to 1. A tensor before a normalization can be scaled freely, G_k then scales by the inverse: only
    ||theta_k|| ||G_k|| is meaningful, and it is comparable to L, since by Euler sum_k <theta_k, G_k> is.
    """
    norms = {k: c[k] ** 2 * math.exp(2 * alpha * rates[k]) * square for k, square in squares.items()}
    total = sum(norms.values())
    if total <= 0:
        raise UserError("the left side of the stationarity condition is zero", "choose left_side=identity")
    if weighting == "relative":
        return dict.fromkeys(norms, 1 / total)
    if weighting == "scale_free":
        own = {k: math.exp(2 * alpha * rates[k]) * square / total for k, square in squares.items()}
        return {k: 1 / total if norm > 0 else own[k] ** own_scale / total for k, norm in norms.items()}
    if weighting == "per_tensor":
        return {k: 1 / (len(norms) * norm) if norm > 0 else 1 / total for k, norm in norms.items()}
    raise UserError(f"weighting={weighting!r} is unknown", f"choose one of {', '.join(WEIGHTINGS)}")


def terms_and_direction(
    theta: Mapping[str, Tensor],
    G: Mapping[str, Tensor],
    weights: Mapping[str, float],
    rates: Mapping[str, float],
    c: Mapping[str, float],
    alpha: float,
    weight: float = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """w_k ||r_k||^2 per tensor, whose sum is L_stat (the relative residual), and v_k = weight dL_stat/dG_k = -2 weight w_k g_k r_k.

    Uses the fewest passes over tensors of theta's size: with s_k = c_k e^(a lambda_k) and g_k = e^(a (1 - lambda_k)), r_k is
    s_k (theta_k - g_k / s_k G_k) or -g_k (G_k - s_k / g_k theta_k), the larger factor outside: the bracket is one pass, and becomes v_k.
    """
    terms, v = {}, {}
    for k, t in theta.items():
        s, g = c[k] * math.exp(alpha * rates[k]), math.exp(alpha * (1 - rates[k]))
        unit, bracket = (s, torch.sub(t, G[k], alpha=g / s)) if s > g else (-g, torch.sub(G[k], t, alpha=s / g))
        terms[k] = weights[k] * unit**2 * torch.linalg.vector_norm(bracket).square()
        v[k] = bracket.mul_(-2 * weight * weights[k] * g * unit)
    return terms, v


def cotangents(
    G: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    sample_loss: Tensor | None = None,
) -> list[Tensor]:
    """d/d(inputs) of <v, G> + sample_loss, from the graph that ``kkt_sum(keep_graph=True)`` kept.

    Args:
        G: the micro-batch's own sum, with its graph.
        v: the direction from the *global* residual, detached.
        inputs: x ``[B, *S]`` and mu ``[B, C]`` (leaves or not).
        sample_loss: scalar that is a plain sum over samples (duality, prior).

    Returns:
        one gradient per input, zeros where an input is not reached.
    """
    outputs: list[Tensor] = [G[k] for k in v]
    seeds: list[Tensor | None] = [v[k] for k in v]
    if sample_loss is not None:
        outputs.append(sample_loss)
        seeds.append(None)
    return list(torch.autograd.grad(outputs, list(inputs), seeds, allow_unused=True, materialize_grads=True))
