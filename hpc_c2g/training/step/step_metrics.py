"""Scalars of a step: every member's terms, summed over its samples on all ranks, and the summary of several members."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpc_c2g.distributed.reduction import Summation
from hpc_c2g.errors import UserError
from hpc_c2g.kkt import duality
from hpc_c2g.monitoring.step_scalars import STEP_SCALARS
from hpc_c2g.training.step.objective import Residual

BALANCE = ("sum_mu_m", "sum_mu", "gx", "gmu")
"""Terms sum mu m / S and sum mu / S, and the squared norms of the cotangents of x and mu."""


class MetricAccumulator:
    """Accumulator of every member's scalars over micro-batches and ranks.

    Args:
        tensors: Names of each member's parameters.
        losses: Names of each member's weighted losses over samples.
        summation: Sum over all ranks.
        device: Device of the sums, which are float64.
        prefixes: Prefixes of the members' names in the summary.
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[str]],
        losses: Sequence[Sequence[str]],
        summation: Summation,
        device: torch.device,
        prefixes: Sequence[str] = ("",),
    ) -> None:
        self.names = [
            [*(f"stationarity/{name}" for name in theta), *terms, *BALANCE]
            for theta, terms in zip(tensors, losses, strict=True)
        ]
        self.losses, self.summation, self.prefixes = [list(terms) for terms in losses], summation, list(prefixes)
        slots = [(k, name) for k, names in enumerate(self.names) for name in names]
        self.slots = {slot: i for i, slot in enumerate(slots)}
        self.empty = torch.zeros(len(slots), dtype=torch.float64, device=device)

    def add(self, member: int, values: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's scalars of one member, by name."""
        places = torch.tensor([self.slots[member, name] for name in values], device=self.empty.device)
        scalars = torch.stack([v.detach().double() for v in values.values()])
        self.summation.add({"scalars": self.empty.index_put((places,), scalars)})

    def reduce(self, step: int, gradient_norm: Tensor) -> tuple[list[dict[str, float]], float]:
        """Return the sums per member and the norm of the generator's gradient, copied to the host in one tensor.

        Raises:
            UserError: One of them is not finite.
        """
        sums = self.summation.total()["scalars"]
        *numbers, norm = torch.cat([sums, gradient_norm.detach().to(sums).reshape(1)]).tolist()
        figures: list[dict[str, float]] = [{} for _ in self.names]
        for (k, name), value in zip(self.slots, numbers, strict=True):
            figures[k][name] = value
            _check(step, f"{self.prefixes[k]}{name}", value)
        _check(step, "gradient/generator", norm)
        return figures, norm

    def summarize(
        self, figures: Sequence[Mapping[str, float]], alphas: Sequence[float], norm: float, weight: float
    ) -> dict[str, float]:
        """Return the scalars to log: of one member under plain names; of several the means, and each one's under its prefix.

        Args:
            figures: Result of ``reduce``.
            alphas: Alpha of each member.
            norm: Norm of the generator's gradient.
            weight: Weight of L_stat in the loss.
        """
        summary = [
            _summary(f, terms, alpha, weight) for f, terms, alpha in zip(figures, self.losses, alphas, strict=True)
        ]
        if len(summary) == 1:
            return {**summary[0], "gradient/generator": norm}
        means = {
            name: sum(one[name] for one in summary) / len(summary)
            for name in ("loss", "stationarity", *(scalar.name for scalar in STEP_SCALARS if scalar.mean))
        }
        each = {
            f"{own}{name}": value
            for own, one in zip(self.prefixes, summary, strict=True)
            for name, value in one.items()
        }
        return {**means, "gradient/generator": norm, **each}


def micro_batch_scalars(
    micro_batch: tuple[int, int],
    residual: Residual,
    losses: Mapping[str, Tensor],
    margins: Tensor,
    multipliers: Tensor,
    S: float,
    gx: Tensor,
    gmu: Tensor,
) -> dict[str, Tensor]:
    """Return the scalars of one micro-batch, for ``MetricAccumulator.add``."""
    once = residual.terms if micro_batch[0] == 0 else {}  # L_stat is known to every rank, and counts once
    mu_m, mu = duality.weighted_margin_sums(margins, multipliers)
    balance = (mu_m / S, mu / S, gx.square().sum(), gmu.square().sum())
    return {
        **{f"stationarity/{name}": term for name, term in once.items()},
        **losses,
        **dict(zip(BALANCE, balance, strict=True)),
    }


def _summary(figures: Mapping[str, float], terms: Sequence[str], alpha: float, weight: float) -> dict[str, float]:
    residual = sum(value for name, value in figures.items() if name.startswith("stationarity/"))
    return {
        "loss": weight * residual + sum(figures[name] for name in terms),
        "stationarity": residual,
        **{scalar.name: scalar.function(figures, alpha) for scalar in STEP_SCALARS},
        **{name: value for name, value in figures.items() if name not in BALANCE},
    }


def _check(step: int, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"step {step}: the term {name!r} is {value}; the generator was not updated",
            "train in another run_dir with a lower optimizer.lr, or check the classifier's weights",
        )
