"""Typed settings of the objective's terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hpc_c2g.errors import require
from hpc_c2g.kkt import loss_terms

STATISTICS = ("auto", "batch", "frozen")


@dataclass
class StationarityConfig:
    """The stationarity term L_stat.

    Attributes:
        weight: Weight in the loss; 0 leaves classification alone.
        statistics: Statistics that a BatchNorm takes: ``frozen`` the running ones; ``batch`` those of all samples of a step, which
            couples them and needs them held at once; ``auto`` is ``batch`` if the classifier has a BatchNorm.
    """

    weight: float = 1.0
    statistics: str = "auto"

    def __post_init__(self) -> None:
        require(
            self.statistics in STATISTICS, "stationarity.statistics", self.statistics, f"choose {', '.join(STATISTICS)}"
        )
        require(self.weight >= 0, "stationarity.weight", self.weight, "give a weight >= 0")


@dataclass
class LossWeights:
    """Weights of loss terms, one field for each weight that ``LOSS_TERMS`` has in a section of the settings."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            weight = getattr(self, field_.name)
            require(weight >= 0, f"{self.section}.{field_.name}", weight, "give a weight >= 0")


def weights_schema(section: str) -> type[LossWeights]:
    """The dataclass of the weights in ``section`` of the settings (``duality`` or ``prior``), from the registry of loss terms."""
    weights = {
        field_: weight
        for term in loss_terms.LOSS_TERMS
        for weight in term.weight
        for own, field_ in [weight.setting.split(".")]
        if own == section
    }
    entries = "\n".join(f"    {name}: {weight.description}" for name, weight in weights.items())
    schema: type[LossWeights] = dataclasses.make_dataclass(
        f"{section.capitalize()}Config",
        [(name, float, dataclasses.field(default=weight.default)) for name, weight in weights.items()],
        bases=(LossWeights,),
        namespace={"section": section, "__module__": __name__},
    )
    schema.__doc__ = f"Weights of the {section} terms.\n\nAttributes:\n{entries}\n"
    return schema


DualityConfig: Callable[..., LossWeights] = weights_schema("duality")
PriorConfig: Callable[..., LossWeights] = weights_schema("prior")


@dataclass
class AlphaConfig:
    """The scale alpha: its data-free start and its feedback on rho, which is 1 at a KKT point.

    Attributes:
        init: Value of alpha at step 0; null computes it from probes and the pilot.
        safety_factor: Factor on the probes' estimate of e^a, towards its high side.
        pilot_steps: Steps of a short run on free images that brings alpha close before the generator starts; 0 for none.
        max_change: Largest change of alpha per step.
    """

    init: float | None = None
    safety_factor: float = 1.5
    pilot_steps: int = 400
    max_change: float = 0.02

    def __post_init__(self) -> None:
        require(self.init is None or abs(self.init) <= 100, "alpha.init", self.init, "give alpha in [-100, 100]")
        require(self.safety_factor > 0, "alpha.safety_factor", self.safety_factor, "give a factor > 0")
        require(self.pilot_steps >= 0, "alpha.pilot_steps", self.pilot_steps, "give a number of steps, or 0 for none")
        require(self.max_change >= 0, "alpha.max_change", self.max_change, "give a rate >= 0")
