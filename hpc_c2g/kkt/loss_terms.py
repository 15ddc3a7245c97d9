"""The registry of loss terms that are sums over samples: duality and priors, each with its weights.

The settings ``duality.*`` and ``prior.*``, the objective and the curves of a run are derived from ``LOSS_TERMS``. To add a prior, write
its function here and add its ``LossTerm``. Functions import what they compute with themselves: settings are read without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_c2g.kkt.normalization import Moments

IMAGE, BATCH_STATISTICS, INPUT_MOMENTS = "image", "batch statistics", "input moments"


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch of b samples of one classifier, and what is known of its whole batch.

    Attributes:
        margins: Margins m_ij, ``[b, C]``.
        multipliers: Multipliers mu_ij, ``[b, C]``.
        x: Samples in the classifier's normalized space, ``[b, *S]``.
        labels: Class of each sample, ``[b]``.
        alpha: The scale a.
        scale: S = <Lambda theta(a), c theta(a)>.
        batch: B, samples of the whole batch.
        lower: Lower end of the input box, ``[*S]``.
        upper: Upper end of the input box, ``[*S]``.
        layer_moments: Batch statistics, one entry per BatchNorm; empty where statistics are frozen.
        input_moments: E x and E x^2 over the whole batch, ``[2, *S]``; None unless a term with a weight needs them.
    """

    margins: Tensor
    multipliers: Tensor
    x: Tensor
    labels: Tensor
    alpha: float
    scale: float
    batch: int
    lower: Tensor
    upper: Tensor
    layer_moments: Sequence[Moments] = ()
    input_moments: Tensor | None = None


@dataclass(frozen=True)
class Weight:
    """A weight of a loss term, as a setting.

    Attributes:
        setting: Section and field, such as ``prior.mean``.
        default: Default value, >= 0.
        description: One line of help.
    """

    setting: str
    default: float
    description: str


@dataclass(frozen=True)
class LossTerm:
    """A weighted loss that is a plain sum over samples, divided by the whole batch, so that micro-batches and ranks add up.

    Attributes:
        name: Name of its scalar in metrics and curves.
        weight: Weights, as settings.
        function: Takes the inputs and the value of each weight; returns the weighted loss of the micro-batch, a scalar.
        needs: Properties of a run without which the term does not apply: ``IMAGE``, ``BATCH_STATISTICS``, ``INPUT_MOMENTS``.
        always: Computed and logged with weight 0 too.
    """

    name: str
    weight: tuple[Weight, ...]
    function: Callable[..., Tensor]
    needs: frozenset[str] = frozenset()
    always: bool = False


def feasibility(s: LossInputs, weight: float) -> Tensor:
    """See ``duality.feasibility``."""
    from hpc_c2g.kkt import duality

    return weight * duality.feasibility(s.margins, s.labels, s.alpha, s.batch)


def box(s: LossInputs) -> Tensor:
    """See ``priors.box_excess``."""
    from hpc_c2g.kkt import priors

    return priors.box_excess(s.x, s.lower, s.upper, s.batch)


def slackness(s: LossInputs, weight: float) -> Tensor:
    """See ``duality.slackness``."""
    from hpc_c2g.kkt import duality

    return weight * duality.slackness(s.margins, s.multipliers, s.alpha, s.scale)


def total_variation(s: LossInputs, weight: float) -> Tensor:
    """See ``priors.total_variation``."""
    from hpc_c2g.kkt import priors

    return weight * priors.total_variation(s.x, s.batch)


def statistics(s: LossInputs, weight: float) -> Tensor:
    """The micro-batch's share of ``priors.statistics_distance``, which is known to every rank."""
    from hpc_c2g.kkt import priors

    return weight * priors.statistics_distance(s.layer_moments) * (len(s.x) / s.batch)


def standard(s: LossInputs, mean: float, deviation: float) -> Tensor:
    """The micro-batch's share of ``priors.standard_distance``, with the exact slope of its own samples."""
    from hpc_c2g.kkt import priors

    return priors.standard_share(s.x, s.input_moments, mean, deviation, s.batch)


LOSS_TERMS: tuple[LossTerm, ...] = (
    LossTerm(
        "feasibility",
        (Weight("duality.feasibility", 0.1, "Weight of primal feasibility: scaled margins of at least 1."),),
        feasibility,
        always=True,
    ),
    LossTerm("box", (), box, always=True),
    LossTerm(
        "slackness",
        (Weight("duality.slackness", 0.0, "Weight of complementary slackness: no multiplier above the margin."),),
        slackness,
    ),
    LossTerm(
        "total_variation",
        (Weight("prior.total_variation", 0.0, "Weight of differences between neighboring pixels."),),
        total_variation,
        frozenset({IMAGE}),
    ),
    LossTerm(
        "statistics",
        (
            Weight(
                "prior.statistics",
                0.0,
                "Weight of the distance of batch statistics to the running ones of the classifier's BatchNorms.",
            ),
        ),
        statistics,
        frozenset({BATCH_STATISTICS}),
    ),
    LossTerm(
        "standard",
        (
            Weight("prior.mean", 0.0, "Weight of the batch's mean, for a classifier that subtracts its training mean."),
            Weight(
                "prior.deviation",
                0.0,
                "Weight of each input entry's distance from deviation 1, for a classifier that divides by its training deviation.",
            ),
        ),
        standard,
        frozenset({INPUT_MOMENTS}),
    ),
)
"""In the order in which they are summed; new terms go last, so that the sums of others keep their bits."""


def loss_names() -> tuple[str, ...]:
    """Names of all loss terms, which are those of their curves."""
    return tuple(term.name for term in LOSS_TERMS)
