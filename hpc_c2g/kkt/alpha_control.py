"""The unknown scale alpha: its initial value (data-free probes) and its control (feedback on complementary slackness).

L_stat alone cannot determine alpha. At a KKT point every supported scaled margin is 1, so rho = sum mu e^a m / sum mu is driven
to its target (1) from the high side of e^a; the low side is a second, bad basin (samples saturate the box).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hpc_c2g.errors import UserError
from hpc_c2g.kkt.margins import pairwise_margins, smallest_margins

TARGET_RHO = 1.0
"""rho at a KKT point."""
GAIN = 5.0
"""Factor on log(rho) before it is clipped to [-1, 1]."""


def probe_margin(
    classify: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor, seed: int, count: int = 4096
) -> float:
    """Mean gap of the two largest logits over inputs drawn uniformly from the box ``[lower, upper]`` (each ``[*S]``)."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, *lower.shape, generator=generator, dtype=torch.float64).to(lower)
    with torch.no_grad():
        top = classify(lower + (upper - lower) * u).topk(2, dim=1).values
    return float((top[:, 0] - top[:, 1]).mean())


def ascended_margin(
    classify: Callable[[Tensor], Tensor],
    lower: Tensor,
    upper: Tensor,
    classes: int,
    seed: int,
    count: int = 200,
    steps: int = 200,
    lr: float = 0.05,
) -> float:
    """Mean runner-up margin that margin ascent reaches inside the box: Adam, ``lr`` in units of the half range."""
    generator = torch.Generator().manual_seed(seed)
    center, half = (lower + upper) / 2, (upper - lower) / 2
    labels = torch.arange(count, device=lower.device) % classes
    start = 0.01 * torch.randn(count, *lower.shape, generator=generator, dtype=torch.float64).to(lower)
    t = start.requires_grad_()
    optimizer = torch.optim.Adam([t], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            margins = smallest_margins(pairwise_margins(classify(center + half * t), labels), labels)
            t.grad = torch.autograd.grad(-margins.mean(), t)[0]
            optimizer.step()
            with torch.no_grad():
                t.clamp_(-1, 1)
    with torch.no_grad():
        return float(smallest_margins(pairwise_margins(classify(center + half * t), labels), labels).mean())


def initial_alpha(probe: float, ascended: float, safety_factor: float = 1.5) -> float:
    """a0 = -log(sqrt(m_probe m_max) / safety_factor): on the high side of e^a.

    Raises:
        UserError: the probes found no positive margin, the classifier's output does not depend on its input.
    """
    if not (probe > 0 and ascended > 0 and math.isfinite(probe * ascended)):
        raise UserError(
            f"the classifier shows no margin on probes (uniform {probe:.3g}, ascended {ascended:.3g})",
            "check that it is trained and that its normalization and value range are right",
        )
    return -math.log(math.sqrt(probe * ascended) / safety_factor)


def feedback(
    alpha: float, alpha0: float, rho: float, rate: float, target: float = TARGET_RHO, gain: float = GAIN
) -> float:
    """a <- min(a0, a - rate clip(gain log(rho / target), -1, 1)), complementary slackness as a control loop."""
    error = gain * math.log(rho / target) if rho > 0 else -1.0
    return min(alpha0, alpha - rate * max(-1.0, min(1.0, error)))
