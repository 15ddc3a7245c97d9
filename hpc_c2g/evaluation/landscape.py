"""Training data, decision landscape and generated samples of a classifier of points in the plane. *Uses real data.*

At a KKT point the samples that carry multipliers lie on the margin, and the classifier depends on no others. So generated points should
lie near the *support samples*, those with a multiplier in the certificate, and need not lie near the others.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.classifiers.rates import find_rates
from hpc_c2g.data.dataset import Dataset
from hpc_c2g.fitting.certificate import certify

GRID = 300
"""Number of grid points of the landscape per side."""
CARRIES = 1e-6
"""Smallest multiplier of a support sample, as a share of the certificate's largest one."""


@dataclass(frozen=True)
class Support:
    """Training samples that carry multipliers, and distances of generated samples to them.

    Attributes:
        carries: True for each training sample that carries a multiplier, ``[n]``.
        to_support: Median distance of a generated sample to the nearest support sample of its class.
        to_others: Median distance of a generated sample to the nearest other training sample of its class; nan if there is none.
    """

    carries: Tensor
    to_support: float
    to_others: float


def support(bundle: Bundle, train: Dataset, samples: Tensor, labels: Tensor) -> Support:
    """Return the support samples of the classifier's certificate, and the distances of generated samples to them.

    Args:
        bundle: Bundle of the classifier.
        train: Data that the classifier was fitted to.
        samples: Generated samples ``[m, *S]`` in raw units.
        labels: Labels ``[m]`` of the generated samples.
    """
    x = bundle.normalization.normalize(train.samples.double())
    found = certify(bundle, x, train.labels, find_rates(bundle.model).parameters)
    mass = found.multipliers.sum(1)
    carries = mass > CARRIES * mass.max()
    nearest: dict[bool, list[Tensor]] = {True: [], False: []}
    for label in torch.unique(labels).tolist():
        own = samples[labels == label].flatten(1)
        for kind, distances in nearest.items():
            there = train.samples[(train.labels == label) & (carries == kind)].flatten(1).to(own)
            if len(there):
                distances.append(torch.cdist(own, there).amin(1))
    median = {kind: float(torch.cat(d).median()) if d else float("nan") for kind, d in nearest.items()}
    return Support(carries, median[True], median[False])


def picture(bundle: Bundle, train: Dataset, samples: Tensor, labels: Tensor, carries: Tensor) -> bytes:
    """Return a PNG: classes' regions shaded by the margin, training points (ringed if they carry multipliers), generated points."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low, high = train.value_range
    axis = torch.linspace(low, high, GRID)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    with torch.no_grad():
        model = bundle.model.float()
        logits = model(bundle.normalization.normalize(plane).float())
    top = logits.topk(2, 1)
    margin = (top.values[:, 0] - top.values[:, 1]).reshape(GRID, GRID).numpy()
    region = top.indices[:, 0].reshape(GRID, GRID).numpy()
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    marks = "osD^v*"
    for place, (title, points, own) in enumerate(
        (
            ("training data, ringed where they carry multipliers", train.samples, train.labels),
            ("generated", samples, labels),
        )
    ):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.contourf(axis, axis, region, levels=np.arange(-0.5, len(train.classes)), colors=colors, alpha=0.18)
        axes.contour(axis, axis, margin, levels=6, colors="gray", linewidths=0.5, alpha=0.6)
        for label, name in enumerate(train.classes):
            here = points[own == label]
            look: dict[str, Any] = {
                "marker": marks[label % len(marks)],
                "color": colors[label % len(colors)],
                "edgecolors": "white",
            }
            axes.scatter(here[:, 0], here[:, 1], s=26 if place == 0 else 9, linewidths=0.4, label=name, **look)
        if place == 0:
            ringed = points[carries]
            axes.scatter(ringed[:, 0], ringed[:, 1], s=90, facecolors="none", edgecolors="black", linewidths=1.1)
            axes.legend(fontsize=9, title="class", loc="upper right")
        axes.set(title=title, xlim=(low, high), ylim=(low, high), aspect="equal")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()
