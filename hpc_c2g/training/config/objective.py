"""Typed settings of the objective's terms: what a generator is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_c2g.errors import require
from hpc_c2g.kkt.options import AUTO, LEFT_SIDES, WEIGHTINGS

STATISTICS = ("auto", "batch", "frozen")


@dataclass
class StationarityConfig:
    """L_stat.

    Attributes:
        left_side: ``identity``, ``rates``, ``top_rate``, or ``auto``: ``identity``, but ``rates`` where some rate is 0.
        weighting: over tensors, ``relative``, ``per_tensor`` or ``scale_free``: ``relative``, but what is before a normalization in its
            own scale (see ``residual_weights``).
        anneal_fraction: share of the steps over which ``scale_free`` grows out of ``relative``; 0 for at once.
        weight: in the loss; 0 leaves classification alone.
        statistics: that a BatchNorm takes: ``frozen`` its running ones; ``batch`` those of all samples of a step, which couples them and
            needs them held at once; ``auto`` is ``batch`` where the classifier has a BatchNorm.
    """

    left_side: str = AUTO
    weighting: str = "scale_free"
    anneal_fraction: float = 0.6
    weight: float = 1.0
    statistics: str = "auto"

    def __post_init__(self) -> None:
        forms = (AUTO, *LEFT_SIDES)
        require(self.left_side in forms, "stationarity.left_side", self.left_side, f"choose {', '.join(forms)}")
        require(
            self.statistics in STATISTICS, "stationarity.statistics", self.statistics, f"choose {', '.join(STATISTICS)}"
        )
        require(
            self.weighting in WEIGHTINGS, "stationarity.weighting", self.weighting, f"choose {', '.join(WEIGHTINGS)}"
        )
        share = "stationarity.anneal_fraction"
        require(0 <= self.anneal_fraction <= 1, share, self.anneal_fraction, "give a share in [0, 1]")
        require(self.weight >= 0, "stationarity.weight", self.weight, "give a weight >= 0")


@dataclass
class DualityConfig:
    """Weights of primal feasibility and complementary slackness."""

    feasibility: float = 0.1
    slackness: float = 0.0

    def __post_init__(self) -> None:
        require(self.feasibility >= 0, "duality.feasibility", self.feasibility, "give a weight >= 0")
        require(self.slackness >= 0, "duality.slackness", self.slackness, "give a weight >= 0")


@dataclass
class AlphaConfig:
    """alpha: its data-free start and its feedback.

    Attributes:
        init: alpha at step 0; None computes it from probes and the pilot.
        safety_factor: factor on the high side of e^a that the probes' estimate gets.
        pilot_steps: steps of a short run on free images that brings alpha close before the generator starts.
        max_change: largest change of alpha per step.
        target_rho: the rho that the feedback aims at.
        gain: on log(rho / target) before it is clipped to [-1, 1].
    """

    init: float | None = None
    safety_factor: float = 1.5
    pilot_steps: int = 400
    max_change: float = 0.02
    target_rho: float = 1.0
    gain: float = 5.0

    def __post_init__(self) -> None:
        require(self.init is None or abs(self.init) <= 100, "alpha.init", self.init, "give alpha in [-100, 100]")
        require(self.safety_factor > 0, "alpha.safety_factor", self.safety_factor, "give a factor > 0")
        require(self.pilot_steps >= 0, "alpha.pilot_steps", self.pilot_steps, "give a number of steps, or 0 for none")
        require(self.max_change >= 0, "alpha.max_change", self.max_change, "give a rate >= 0")
        require(self.gain > 0, "alpha.gain", self.gain, "give a gain > 0")
        require(self.target_rho > 0, "alpha.target_rho", self.target_rho, "give a target > 0")


@dataclass
class GateConfig:
    """Width of the smooth gates in units of the layer's pre-activation scale, annealed geometrically."""

    start: float = 0.5
    end: float = 0.05
    anneal_fraction: float = 0.8

    def __post_init__(self) -> None:
        require(self.start >= self.end > 0, "gates.start/gates.end", (self.start, self.end), "give start >= end > 0")
        require(0 < self.anneal_fraction <= 1, "gates.anneal_fraction", self.anneal_fraction, "give a share in (0, 1]")


@dataclass
class PriorConfig:
    """Weights of the priors on samples; the repulsion's range and how many reference samples it looks at.

    Attributes:
        box: on values outside the input box.
        total_variation: on differences of neighboring pixels.
        statistics: draws the batch's statistics to the running ones of the classifier's BatchNorms.
        mean: draws the mean of the batch to 0, for a classifier that subtracts its training mean.
        deviation: draws the deviation of each input entry to 1, for a classifier that divides by its training deviation.
        repulsion: between samples of a class.
        repulsion_width: its range, in units of the samples' root mean square norm.
        repulsion_references: samples of the batch that repel.
    """

    box: float = 1.0
    total_variation: float = 0.0
    statistics: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0
    repulsion: float = 0.0
    repulsion_width: float = 0.5
    repulsion_references: int = 1000

    def __post_init__(self) -> None:
        for name in ("box", "total_variation", "statistics", "mean", "deviation", "repulsion"):
            require(getattr(self, name) >= 0, f"prior.{name}", getattr(self, name), "give a weight >= 0")
        require(self.repulsion_width > 0, "prior.repulsion_width", self.repulsion_width, "give a range > 0")
        require(self.repulsion_references >= 1, "prior.repulsion_references", self.repulsion_references, "give >= 1")
