"""Synthetic points ``[2]`` in -3..3, drawn from the seed: blobs, moons, spirals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_c2g.data.choose import HELD_OUT, TRAIN, balanced_train_shares, even_shares, relabel
from hpc_c2g.data.config import DataConfig
from hpc_c2g.data.dataset import Dataset, Split
from hpc_c2g.errors import UserError

Floats = NDArray[np.float64]

TOY_RANGE = (-3.0, 3.0)
HELD_OUT_SIZE = 1000


def blob(label: int, along: Floats, noise: Floats) -> Floats:
    """Four Gaussians at the corners of a square; ``along`` is not used."""
    center = 1.2 * np.array([(-1, 1)[label % 2], (-1, 1)[label // 2]])
    return np.asarray(center + 0.35 * noise)


def moon(label: int, along: Floats, noise: Floats) -> Floats:
    """Two interleaved half circles, centered on the origin."""
    arc = np.stack([np.cos(np.pi * along), np.sin(np.pi * along)], axis=1)
    half = arc if label == 0 else np.array([1.0, 0.5]) - arc
    return np.asarray(1.6 * (half - np.array([0.5, 0.25]) + 0.1 * noise))


def spiral(label: int, along: Floats, noise: Floats) -> Floats:
    """Three arms of one turn each."""
    # The root makes the points about equally dense all along the arm.
    reach = np.sqrt(along)
    angle = 2 * np.pi * (reach + label / 3)
    arm = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray((0.3 + 2.3 * reach)[:, None] * arm + 0.08 * noise)


SHAPES: dict[str, tuple[Callable[[int, Floats, Floats], Floats], int]] = {
    "blobs": (blob, 4),
    "moons": (moon, 2),
    "spirals": (spiral, 3),
}
"""Name -> (class, uniform ``[n]`` and normal ``[n, 2]`` numbers to points ``[n, 2]``; number of classes)."""


def load_toy(config: DataConfig) -> Split:
    """``blobs`` (4 classes), ``moons`` (2) or ``spirals`` (3), equally many points per class.

    A class is one stream of points keyed by seed, part and class: a larger train part contains a smaller one. The
    held-out part has 1000 new points unless ``held_out_size`` is set.

    Raises:
        UserError: fewer points than classes, or a class that the toy does not have.
    """
    shape, count = SHAPES[config.name]
    _, names = relabel(np.arange(count, dtype=np.int64), [str(c) for c in range(count)], config)
    held_size = HELD_OUT_SIZE if config.held_out_size is None else config.held_out_size
    if held_size < len(names):
        raise UserError(
            f"data.held_out_size={held_size} leaves some of the {len(names)} classes of {config.name} empty",
            f"give data.held_out_size >= {len(names)}",
        )

    def draw(label: int, size: int, stream: int) -> Floats:
        # Two streams, because a larger size must not move the numbers of one behind those of the other.
        along, noise = (np.random.default_rng([config.seed, stream, label, k]) for k in range(2))
        return shape(label, along.random(size), noise.standard_normal((size, 2))).clip(*TOY_RANGE)

    def part(shares: list[int], stream: int) -> Dataset:
        points = [draw(int(name), share, stream) for name, share in zip(names, shares, strict=True)]
        labels = torch.arange(len(names)).repeat_interleave(torch.tensor(shares))
        return Dataset(torch.from_numpy(np.concatenate(points)).float(), labels, names, TOY_RANGE)

    return Split(
        part(balanced_train_shares(config, names), TRAIN),
        part(even_shares(held_size, len(names)), HELD_OUT),
    )
