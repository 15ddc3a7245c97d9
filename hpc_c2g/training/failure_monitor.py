"""Monitor that checks a run's logged scalars for signatures of failure and applies the run's alarm policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_c2g.errors import UserError
from hpc_c2g.monitoring.config import AlarmConfig
from hpc_c2g.monitoring.sample_metrics import sample_metrics
from hpc_c2g.monitoring.signatures import BY_NAME, GRACE, WINDOW, judged, levels
from hpc_c2g.training.step.sample_stats import SampleStats

LOWERED_LR = 0.5
"""Factor on all learning rates each time that a signature begins to fire, with ``alarms.policy=lower_lr``."""


def sample_scalars(
    sample_stats: Sequence[SampleStats], classes: Sequence[int], prefixes: Sequence[str]
) -> dict[str, float]:
    """Return the sample metrics of every member under its prefix, and the means over several members."""
    per_member: list[dict[str, float]] = []
    for band, count in zip(sample_stats, classes, strict=True):
        margins, multipliers, labels, samples = (
            part.cpu().numpy() for part in (band.margins, band.multipliers, band.labels, band.samples)
        )
        per_member.append(sample_metrics(margins, multipliers, labels, samples, count))
    if len(per_member) == 1:
        return per_member[0]
    means = {name: sum(one[name] for one in per_member) / len(per_member) for name in per_member[0]}
    return means | {
        f"{own}{name}": value for own, one in zip(prefixes, per_member, strict=True) for name, value in one.items()
    }


@dataclass(frozen=True)
class MonitorState:
    """Result of one update of the monitor.

    Attributes:
        scalars: Scalars to log.
        firing: Names of the signatures that fire.
        begun: Names of the signatures that fire and did not at the update before.
        ease: Factor on the learning rates from now on.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    firing: tuple[str, ...] = ()
    newly_firing: tuple[str, ...] = ()
    lr_scale: float = 1.0


class FailureMonitor:
    """Monitor of logged steps; its verdicts are functions of the last ``WINDOW`` lines, which a checkpoint keeps.

    Args:
        config: Settings of the alarms.
        steps: Number of steps of the run.
        state: Result of ``state_dict`` if the run is resumed.
    """

    def __init__(self, config: AlarmConfig, steps: int, state: Mapping[str, Any] | None = None) -> None:
        self.config, self.steps = config, steps
        state = state or {}
        self.state = MonitorState(firing=tuple(state.get("firing", ())), lr_scale=state.get("ease", 1.0))
        self.lines = [dict(line) for line in state.get("lines", ())]

    def update(self, step: int, line: Mapping[str, float]) -> MonitorState:
        """Update the verdicts with another logged step."""
        before = self.state
        if step > GRACE * self.steps:
            self.lines = [*self.lines, judged(line)][-WINDOW:]
        if len(self.lines) == WINDOW:
            found = levels(self.lines)
            firing = tuple(name for name, level in found.items() if level > 1)
            newly_firing = tuple(name for name in firing if name not in before.firing)
            lowered = newly_firing and self.config.policy == "lower_lr"
            scalars = {f"signature/{name}": level for name, level in found.items()}
            scalars |= {f"alarm/{name}": float(name in firing) for name in found}
            self.state = MonitorState(scalars, firing, newly_firing, before.lr_scale * (LOWERED_LR if lowered else 1.0))
        return self.state

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"ease": self.state.lr_scale, "firing": list(self.state.firing), "lines": self.lines}


def stop_error(step: int, state: MonitorState) -> UserError:
    """Return the error that ends a run with ``alarms.policy=stop``."""
    first = BY_NAME[state.firing[0]]
    return UserError(
        f"step {step}: {', '.join(state.firing)}: {first.reason}; saved, and stopped because alarms.policy=stop",
        f"in another run_dir {first.advice}; alarms.policy=continue resumes this run anyway",
    )
