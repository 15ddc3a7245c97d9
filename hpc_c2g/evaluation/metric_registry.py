"""The list of evaluation metrics: each one's name, title, direction and function, in the order of evaluation.json.

This file is the only one that names a metric: ``c2g evaluate``, a study's tables, its TensorBoard board, its figures and its
published page derive from it. A new metric is a function of a ``Comparison`` and an entry of ``METRICS``. Nothing here imports
torch before a metric is computed, so that tables of finished runs are made without it.

Every metric *uses real data*. All samples are in raw units (pixels in 0..1); distances are Euclidean over the flattened sample.

| key | meaning | for held-out real images | for the training images |
|---|---|---|---|
| ``proximity`` | median distance to the nearest training image, over the same for held-out images | 1 | 0 |
| ``coverage`` | share of training images with a sample nearer than their nearest held-out image | by chance | 1 |
| ``coverage_chance`` | chance level of ``coverage``: number of samples over that of samples and held-out images | | |
| ``recovered`` | share of training images whose nearest sample is nearer than for 99 % of held-out images | 0.01 | 1 |
| ``recovered_relative`` | the same by that distance over the one to the nearest image of a second held-out set | 0.01 | 1 |
| ``oracle_accuracy`` | share of samples whose label an oracle fitted to half of the held-out data agrees with | best | high |
| ``transfer_accuracy`` | accuracy of an SVC fitted to samples on the other held-out half | best | of n images |
| ``diversity`` | median distance of pairs within a class, over the same for held-out images | 1 | about 1 |
| ``ssim_sample_to_train`` | SSIM of each sample to its nearest training image | by chance | 1 |
| ``ssim_train_to_sample`` | SSIM of each training image to its nearest sample | by chance | 1 |
| ``marginal_distance`` | rows: Kolmogorov-Smirnov distance of a column to that of the training rows, mean over columns | by chance | 0 |
| ``correlation_distance`` | rows: difference of two columns' correlation from that in the training rows, mean over pairs | by chance | 0 |

The chance level of ``coverage`` is reached by samples that are as good as real and know nothing of the training images. That of
``recovered`` is 0.01 whatever the number of samples (see ``recovery``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc_c2g.evaluation.comparison import Comparison

USES_REAL_DATA = "uses real data"


@dataclass(frozen=True)
class Measure:
    """A number that describes a run.

    Attributes:
        name: Key in evaluation.json and in the rows of a study's tables.
        title: Name in figures and tables for a reader.
        better: Direction of improvement: ``high``, ``low``, or ``one`` where real images have 1.
        source: Data that the number is computed with.
    """

    name: str
    title: str
    better: str
    source: str

    @property
    def aim(self) -> str:
        """Direction of improvement in words."""
        return {"high": "higher is better", "low": "lower is better", "one": "best near 1"}[self.better]

    @property
    def note(self) -> str:
        """Source and direction in one line."""
        return f"{self.source} · {self.aim}"


@dataclass(frozen=True)
class Metric(Measure):
    """A measure of generated samples that ``c2g evaluate`` computes.

    Attributes:
        function: The metric of a ``Comparison``: a float, a dictionary of the statistics, or None if it does not apply.
        statistics: Keys of that dictionary; the first one represents the metric in figures and texts with one number.
    """

    function: Callable[[Comparison], Any]
    statistics: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metric's numbers in a table: ``name``, and ``name_STATISTIC`` for each further statistic."""
        return (self.name, *(f"{self.name}_{statistic}" for statistic in self.statistics[1:]))

    def numbers(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The metric's numbers in a row of evaluation.json, by column; empty if it does not apply."""
        value = row.get(self.name)
        values = [value.get(statistic) for statistic in self.statistics] if isinstance(value, dict) else [value]
        found = zip(self.columns, values, strict=False)
        return {name: float(v) for name, v in found if isinstance(v, (int, float)) and not isinstance(v, bool)}


def proximity(c: Comparison) -> float | None:
    """Median distance of a sample to its nearest training image, over the same for held-out images."""
    from hpc_c2g.evaluation.comparison import median, ratio

    return ratio(median(c.to_train[0]), median(c.real_to_train))


def coverage(c: Comparison) -> float:
    """Share of training images with a sample nearer than their nearest held-out image."""
    return float((c.to_sample[0] < c.train_to_real).double().mean())


def coverage_chance(c: Comparison) -> float:
    """Coverage by samples that are as good as real and know nothing of the training images."""
    return len(c.generated) / (len(c.generated) + len(c.real))


def recovered(c: Comparison) -> float | None:
    """Share of training images that pass, by distance, a threshold that 1 % of held-out images pass; None of fewer than 100."""
    from hpc_c2g.evaluation.recovery import share_recovered

    return share_recovered(c, "distance")


def recovered_relative(c: Comparison) -> float | None:
    """The same by relative distance; None of fewer than 200 held-out images."""
    from hpc_c2g.evaluation.recovery import share_recovered

    return share_recovered(c, "relative")


def oracle_accuracy(c: Comparison) -> float:
    """Share of samples whose label the oracle agrees with."""
    from hpc_c2g.evaluation.comparison import agreement

    return agreement(c.oracle, c.generated)


def transfer_accuracy(c: Comparison) -> float:
    """Accuracy, on held-out data, of an SVC fitted to the first samples of every class."""
    from hpc_c2g.evaluation.comparison import TRANSFER_SAMPLES, first_per_class, svc_accuracy

    return svc_accuracy(first_per_class(c.generated, TRANSFER_SAMPLES), c.test_half)


def diversity(c: Comparison) -> float | None:
    """Median distance of pairs of samples within a class, over the same for held-out images."""
    from hpc_c2g.evaluation.comparison import ratio, within_class_median

    return ratio(within_class_median(c.generated, c.seed), within_class_median(c.real, c.seed))


def ssim_sample_to_train(c: Comparison) -> dict[str, float] | None:
    """SSIM of each sample to its nearest training image; None for anything but images."""
    from hpc_c2g.evaluation.ssim import ssim

    return ssim(c.generated.samples, c.train.samples, c.to_train[1], c.train.value_range, c.seed)


def ssim_train_to_sample(c: Comparison) -> dict[str, float] | None:
    """SSIM of each training image to its nearest sample; None for anything but images."""
    from hpc_c2g.evaluation.ssim import ssim

    return ssim(c.train.samples, c.generated.samples, c.to_sample[1], c.train.value_range, c.seed)


def marginal_distance(c: Comparison) -> float | None:
    """Kolmogorov-Smirnov distance of the columns' distributions; None for anything but rows."""
    from hpc_c2g.evaluation import tables

    return tables.marginal_distance(c.generated.samples, c.train.samples)


def correlation_distance(c: Comparison) -> float | None:
    """Difference of the columns' correlations; None for anything but rows."""
    from hpc_c2g.evaluation import tables

    return tables.correlation_distance(c.generated.samples, c.train.samples)


SSIM = ("mean", "best10")

METRICS = (
    Metric("proximity", "proximity", "low", USES_REAL_DATA, proximity),
    Metric("coverage", "coverage", "high", USES_REAL_DATA, coverage),
    Metric("coverage_chance", "coverage by chance", "low", USES_REAL_DATA, coverage_chance),
    Metric("recovered", "recovered at 1 % false", "high", USES_REAL_DATA, recovered),
    Metric("recovered_relative", "recovered relative", "high", USES_REAL_DATA, recovered_relative),
    Metric("oracle_accuracy", "oracle accuracy", "high", USES_REAL_DATA, oracle_accuracy),
    Metric("transfer_accuracy", "transfer accuracy", "high", USES_REAL_DATA, transfer_accuracy),
    Metric("diversity", "diversity", "one", USES_REAL_DATA, diversity),
    Metric("ssim_sample_to_train", "SSIM sample to train", "high", USES_REAL_DATA, ssim_sample_to_train, SSIM),
    Metric("ssim_train_to_sample", "SSIM train to sample", "high", USES_REAL_DATA, ssim_train_to_sample, SSIM),
    Metric("marginal_distance", "marginal distance", "low", USES_REAL_DATA, marginal_distance),
    Metric("correlation_distance", "correlation distance", "low", USES_REAL_DATA, correlation_distance),
)
"""Every metric, in the order of evaluation.json."""

COLUMNS = tuple(column for metric in METRICS for column in metric.columns)
"""Names of all numbers that the metrics give, in the order of a table."""


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """All metrics of one evaluation, or of one baseline, as plain numbers by column.

    Args:
        row: One generator or baseline of evaluation.json.
    """
    return {column: value for metric in METRICS for column, value in metric.numbers(row).items()}
