"""Independent classifiers that check whether a sample shows its class. They *use real data*, only the held-out part.

Images of ``SMALLEST_SIDE`` pixels or more are classified by a small convolutional network, everything else by a support vector machine.
Its accuracy is 0.98 on scikit-learn's digits, but only 0.965 on MNIST from 5000 images, where the network's is 0.989.
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
"""Function from samples ``[N, *S]`` to labels ``[N]``."""

SMALLEST_SIDE = 24

POINTS = 5000
"""Largest number of samples that an oracle is fitted to; the cost of an SVC grows with its square."""

STEPS, BATCH, RATE = 600, 100, 3e-3

SHIFT = 2
"""Largest shift in pixels of the network's training images, which are seen many times."""


def oracle_of(data: Dataset, seed: int) -> Oracle:
    """Return an oracle fitted to ``data``, or to a random choice of ``POINTS`` samples.

    Args:
        data: Real samples in raw units, of at least one class.
        seed: Seed of the choice and of the network.
    """
    if len(data) > POINTS:
        chosen = np.sort(np.random.default_rng([seed, 2]).permutation(len(data))[:POINTS])
        data = data.subset(torch.from_numpy(chosen))
    if data.samples.ndim == 4 and min(data.samples.shape[2:]) >= SMALLEST_SIDE and len(data) > 1:
        return net_oracle(data, seed)
    return svc_oracle(data)


def svc_oracle(data: Dataset) -> Oracle:
    """Return a support vector machine with a Gaussian kernel of scikit-learn's default width and C = 10."""
    labels = data.labels.numpy()
    if len(np.unique(labels)) == 1:
        return lambda samples: torch.full((len(samples),), int(labels[0]))
    model = SVC(C=10.0).fit(flat_rows(data.samples).numpy(), labels)
    return lambda samples: torch.from_numpy(model.predict(flat_rows(samples).numpy()))


def net_oracle(data: Dataset, seed: int) -> Oracle:
    """Return a small convolutional network, fitted by ``STEPS`` steps of Adam to images that are shifted by up to ``SHIFT`` pixels.

    Args:
        data: At least two images.
        seed: Seed of weights, order and shifts. The result depends on ``data`` and ``seed`` only.
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
    """Yield the indices of one batch after the other, in a new order per epoch; drops a last batch of one, as a BatchNorm needs two."""
    while True:
        yield from (batch for batch in torch.split(torch.randperm(count), BATCH) if len(batch) > 1)


def moved(images: Tensor) -> Tensor:
    """Shift each image of ``[n, C, H, W]`` by -SHIFT..SHIFT pixels along both axes, repeating its edge; uses torch's global generator."""
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
