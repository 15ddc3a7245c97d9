"""Recovery of training samples by their multipliers. *Uses real data*, apart from training and after it.

A training sample enters the KKT sum by its multipliers alone. If its share of them is below the classifier's own distance from a KKT
point, it leaves no distinguishable trace. So coverage, and the privacy of a classifier's data, is reported by multiplier share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np

PARTS = 5
Part = dict[str, float]
"""Part of the training samples. ``multipliers``: the part's share of all of them; ``coverage``: the covered share of its samples."""


def by_multiplier(nearness: Sequence[float | None], shares: Sequence[float]) -> list[Part] | None:
    """Return fifths of the training samples by their share of the multipliers, the smallest first; None if the inputs do not match.

    Samples with the same share (many have none) count with their common coverage, in any part.

    Args:
        nearness: Ratio of distances of each training sample, see ``metrics.nearness``.
        shares: Share of the multipliers of each training sample, sum_j mu_ij over the sum of all.
    """
    if len(nearness) != len(shares) or len(shares) < PARTS or not math.fsum(shares) > 0:
        return None
    own = np.asarray(shares, dtype=np.float64)
    covered = np.asarray([near is not None and near < 1 for near in nearness], dtype=np.float64)
    _, tie, count = np.unique(own, return_inverse=True, return_counts=True)
    common = (np.bincount(tie, covered) / count)[tie]
    return [
        {"multipliers": float(own[part].sum()), "coverage": float(common[part].mean())}
        for part in np.array_split(own.argsort(kind="stable"), PARTS)
    ]


def mean_parts(runs: Iterable[Sequence[Part]]) -> list[Part]:
    """Return the mean over runs, part by part."""
    return [{key: mean(part[key] for part in parts) for key in parts[0]} for parts in zip(*runs, strict=True)]


def rows(parts: Sequence[Part]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table of the parts."""
    head = ["training samples, by multiplier", "least fifth", *(str(i) for i in range(2, len(parts))), "most"]
    return head, [
        ["share of all multipliers", *(f"{part['multipliers']:.3f}" for part in parts)],
        ["coverage", *(f"{part['coverage']:.2f}" for part in parts)],
    ]


def shares_in(folder: Path) -> list[float] | None:
    """Return each training sample's share of all multipliers, by the best certificate in a bundle's folder.

    None without a certificate, with one of an earlier version, or with a damaged one.
    """
    try:
        forms = json.loads((folder / "certificate.json").read_text())
        best = min(forms, key=lambda form: float(form["relative_residual"]))
        return [float(share) for share in best["shares"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
