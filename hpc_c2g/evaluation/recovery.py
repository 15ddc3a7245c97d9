"""Evidence that training images come back, and not only images that look like them: recovered at a stated false rate.

Every training image and every *control* (a real image of the same classes that the classifier never saw) gets a score: how near its
nearest sample lies, lower is nearer. The threshold is where ``rate`` of the controls pass; ``recovered`` is the share of training images
that pass too. Samples that know nothing of the training images pass both alike, so the chance level of ``recovered`` is ``rate``, whatever
the number of samples. It is the true positive rate at a fixed false positive rate of a membership test (Carlini et al., "Membership
Inference Attacks From First Principles", IEEE S&P 2022). Everything here *uses real data*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta, rankdata

from hpc_c2g.data.dataset import flat_rows
from hpc_c2g.errors import UserError
from hpc_c2g.evaluation.comparison import Comparison, nearest
from hpc_c2g.evaluation.ssim import SSIM_QUERIES, best_ssim

Array = NDArray[Any]
Scores = tuple[Array, Array]
RATES = (0.01, 0.001)
"""False rates that are reported where there are enough controls."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Recovery:
    """Share of training images that pass a threshold which ``rate`` of the controls pass.

    Attributes:
        rate: False rate, the chance level of ``share``.
        count: Number of training images that pass.
        images: Number of training images.
        share: ``count / images``.
        low: Lower end of the 95 % Clopper-Pearson interval of ``share``.
        high: Upper end of that interval.
        threshold: Score below which an image passes.
        controls: Number of controls.
    """

    rate: float
    count: int
    images: int
    share: float
    low: float
    high: float
    threshold: float
    controls: int


def least_controls(rate: float) -> int:
    """Number of controls that a false rate needs: with fewer than ``1 / rate`` not even one may pass."""
    return math.ceil(1 / rate - 1e-9)


def threshold_at(controls: Array, rate: float) -> float:
    """Score that at most ``rate`` of the controls are strictly below: the ``floor(rate m) + 1``-th smallest of ``m``.

    Args:
        controls: Scores of the controls, ``[m]``, lower is nearer.
        rate: False rate in (0, 1).

    Raises:
        UserError: Fewer than ``1 / rate`` controls.
    """
    m = len(controls)
    if m < least_controls(rate):
        raise UserError(
            f"{m} held-out images cannot support a false rate of {rate:.2g}",
            f"give at least {least_controls(rate)} (data.held_out_size), or a larger rate",
        )
    return float(np.sort(controls)[min(math.floor(rate * m + 1e-9), m - 1)])


def clopper_pearson(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact two-sided interval of a binomial share (Clopper and Pearson, Biometrika 26, 1934).

    Args:
        count: Number of successes.
        total: Number of trials, >= 1.
        confidence: Coverage in (0, 1).
    """
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, total - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, total - count)) if count < total else 1.0
    return low, high


def recovered(images: Array, controls: Array, rate: float) -> Recovery:
    """Share of the training images nearer than the threshold that ``rate`` of the controls pass.

    Args:
        images: Scores of the training images, ``[n]``, lower is nearer.
        controls: Scores of the controls, ``[m]``.
        rate: False rate in (0, 1).

    Raises:
        UserError: Fewer than ``1 / rate`` controls.
    """
    threshold = threshold_at(controls, rate)
    count, n = int((images < threshold).sum()), len(images)
    return Recovery(rate, count, n, count / n, *clopper_pearson(count, n), threshold, len(controls))


def auc(images: Array, controls: Array) -> float:
    """Probability that a training image is nearer than a control, ties counted half: area under the ROC curve, 0.5 by chance.

    Mann-Whitney's U over n m, from the ranks of all scores.

    Args:
        images: Scores of the training images, ``[n]``, lower is nearer.
        controls: Scores of the controls, ``[m]``.
    """
    n, m = len(images), len(controls)
    ranks = rankdata(np.concatenate([images, controls]))
    return float((n * m + n * (n + 1) / 2 - ranks[:n].sum()) / (n * m))


def p_values(images: Array, controls: Array) -> Array:
    """Chance that a control is as near as each training image, ``[n]``: ``(1 + number of controls at most as far) / (1 + m)``.

    Args:
        images: Scores of the training images, ``[n]``, lower is nearer.
        controls: Scores of the controls, ``[m]``.
    """
    nearer = np.searchsorted(np.sort(controls), images, side="right")
    return (1 + nearer) / (1 + len(controls))


def relative_scores(to_sample: Array, to_reference: Array) -> Array:
    """Distance to the nearest sample over that to the nearest image of a reference set, ``[n]``: takes out that some images are easy.

    The reference set is real, unseen and disjoint from the controls. An image that is in it too (distance 0) cannot be judged: its score
    is infinite, so that it never passes.

    Args:
        to_sample: Distances to the nearest sample, ``[n]``.
        to_reference: Distances to the nearest reference image, ``[n]``.
    """
    ratios: Array = np.divide(to_sample, to_reference, out=np.full(len(to_sample), np.inf), where=to_reference > 0)
    return ratios


def distance_scores(c: Comparison) -> Scores:
    """Return the distances to the nearest sample; every held-out image is a control."""
    return c.to_sample[0].numpy(), c.real_to_sample[0].numpy()


def relative_distance_scores(c: Comparison) -> Scores:
    """Return those distances over the ones to the nearest image of a half of the held-out images; the other half are the controls."""
    images, controls = distance_scores(c)
    real = flat_rows(c.real.samples)
    reference, unseen = real[::2], real[1::2]
    to_reference = [nearest(rows, reference)[0].numpy() for rows in (flat_rows(c.train.samples), unseen)]
    return relative_scores(images, to_reference[0]), relative_scores(controls[1::2], to_reference[1])


def ssim_scores(c: Comparison) -> Scores | None:
    """Return minus the SSIM to the most similar of the nearest samples, with at most ``SSIM_QUERIES`` controls; None unless images."""
    if c.train.samples.ndim != 4:
        return None
    samples, value_range = c.generated.samples, c.train.value_range
    chosen = torch.from_numpy(np.random.default_rng([c.seed, 4]).permutation(len(c.real))[:SSIM_QUERIES])
    images = best_ssim(c.train.samples, samples, c.to_sample[1], value_range)
    controls = best_ssim(c.real.samples[chosen], samples, c.real_to_sample[1][chosen], value_range)
    return -images.numpy(), -controls.numpy()


SCORES: dict[str, Callable[[Comparison], Scores | None]] = {
    "distance": distance_scores,
    "relative": relative_distance_scores,
    "ssim": ssim_scores,
}
"""Ways of scoring: each gives the scores of the training images ``[n]`` and of the controls ``[m]``, lower is nearer."""


def share_recovered(c: Comparison, score: str, rate: float = RATES[0]) -> float | None:
    """Return the recovered share of the training images; None if the score does not apply or has too few controls.

    Args:
        c: Samples, training images and held-out images.
        score: Name of one of ``SCORES``.
        rate: False rate.
    """
    found = SCORES[score](c)
    if found is None or len(found[1]) < least_controls(rate):
        return None
    return recovered(*found, rate).share


def report(c: Comparison) -> dict[str, Any]:
    """Return, for every way of scoring, the AUC, the number of controls and the recovered share at each rate that they support.

    Args:
        c: Samples, training images and held-out images.
    """
    found: dict[str, Any] = {}
    for name, function in SCORES.items():
        pair = function(c)
        if pair is not None:
            images, controls = pair
            supported = [rate for rate in RATES if len(controls) >= least_controls(rate)]
            found[name] = {
                "auc": auc(images, controls),
                "controls": len(controls),
                "rates": [asdict(recovered(images, controls, rate)) for rate in supported],
            }
    return found


def as_csv(c: Comparison) -> str:
    """Return a line per training image, the most exposed first: index, label, and score, rank among controls and p-value by each way.

    Args:
        c: Samples, training images and held-out images.
    """
    columns: dict[str, Array] = {"index": np.arange(len(c.train)), "label": c.train.labels.numpy()}
    for name, function in SCORES.items():
        pair = function(c)
        if pair is not None:
            images, controls = pair
            p = p_values(images, controls)
            rank = np.rint(p * (1 + len(controls))).astype(int)
            columns |= {name: images, f"{name}_rank": rank, f"{name}_p": p}
    order = np.lexsort((columns["distance"], columns["distance_p"]))
    rows = zip(*(columns[name][order].tolist() for name in columns), strict=True)
    return "\n".join([",".join(columns), *(",".join(map(_cell, row)) for row in rows)]) + "\n"


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def sentence(report: dict[str, Any]) -> str:
    """Return the result by distance in one sentence, with its interval and its chance level.

    Args:
        report: Result of ``report``.
    """
    found = report["distance"]
    if not found["rates"]:
        return f"{found['controls']} held-out samples are too few to state a false rate of {100 * RATES[0]:g} %"
    r = found["rates"][0]
    return (
        f"{r['count']} of {r['images']} training samples are recovered ({100 * r['rate']:g} % false; 95 % interval"
        f" {100 * r['low']:.0f} to {100 * r['high']:.0f} %; {r['controls']} held-out samples)"
    )
