"""Independent classifiers that tell whether a sample shows what it was generated as. They *use real data*, the held-out part alone.

Images of ``SMALLEST_SIDE`` pixels and more are read by a small convolutional net, everything else by a support vector machine, which reads
0.98 of scikit-learn's digits but not of MNIST (0.965 from 5000 of them; the net 0.989).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_c2g.data.dataset import Dataset, flat_rows

Oracle = Callable[[Tensor], Tensor]
"""Samples ``[N, *S]`` to labels ``[N]``."""

SMALLEST_SIDE = 24

POINTS = 5000
"""Enough for either kind; the cost of an SVC grows with their square."""

STEPS, BATCH, RATE = 600, 100, 3e-3

SHIFT = 2
"""Pixels by which the net's images are moved at random, for each is seen often."""


def oracle_of(data: Dataset, seed: int) -> Oracle:
    """Fitted to ``data``, or to a random ``POINTS`` of it, drawn by ``seed``.

    Args:
        data: real samples in raw units, of one class or more.
        seed: of the choice, and of the net.
    """
    if len(data) > POINTS:
        chosen = np.sort(np.random.default_rng([seed, 2]).permutation(len(data))[:POINTS])
        data = data.subset(torch.from_numpy(chosen))
    if data.samples.ndim == 4 and min(data.samples.shape[2:]) >= SMALLEST_SIDE and len(data) > 1:
        return net_oracle(data, seed)
    return svc_oracle(data)


def svc_oracle(data: Dataset) -> Oracle:
    """A support vector machine: Gaussian kernel of scikit-learn's default width, C = 10."""
    labels = data.labels.numpy()
    if len(np.unique(labels)) == 1:
        return lambda samples: torch.full((len(samples),), int(labels[0]))
    model = SVC(C=10.0).fit(flat_rows(data.samples).numpy(), labels)
    return lambda samples: torch.from_numpy(model.predict(flat_rows(samples).numpy()))


def net_oracle(data: Dataset, seed: int) -> Oracle:
    """Two convolutions and two linear layers, ``STEPS`` of Adam over images moved by up to ``SHIFT`` pixels; depends on data and seed.

    Args:
        data: two images or more.
        seed: of weights, order and shifts.
    """
    low, high = data.value_range
    images = (data.samples.float() - low) / (high - low)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = _net(images.shape[1], len(data.classes))
        adam = torch.optim.AdamW(net.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=STEPS)
        for batch in itertools.islice(_batches(len(images)), STEPS):
            adam.zero_grad()
            F.cross_entropy(net(moved(images[batch])), data.labels[batch]).backward()  # type: ignore[no-untyped-call]
            adam.step()
            schedule.step()
    net.eval()

    @torch.no_grad()
    def read(samples: Tensor) -> Tensor:
        return torch.cat([net((part.float() - low) / (high - low)).argmax(1) for part in torch.split(samples, 1000)])

    return read


def _batches(count: int) -> Iterator[Tensor]:
    """Indices of one batch after the other, in a new order whenever all were seen; without a last one of one, as a BatchNorm needs two."""
    while True:
        yield from (batch for batch in torch.split(torch.randperm(count), BATCH) if len(batch) > 1)


def moved(images: Tensor) -> Tensor:
    """Each of ``[n, C, H, W]`` by -SHIFT..SHIFT pixels along both axes, its edge repeated; torch's global generator."""
    count, _, height, width = images.shape
    wide = F.pad(images, (SHIFT,) * 4, mode="replicate")
    down, right = torch.randint(2 * SHIFT + 1, (2, count))
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    each, channels = torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None]
    return wide[each, channels, rows, columns]


def _net(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 24, 5, padding=2),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 5, padding=2),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(48 * 49, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )
