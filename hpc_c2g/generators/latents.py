"""Latents z, keyed by (seed, step, sample index): the same samples whatever the number of processes or micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from hpc_c2g.generators.config import LatentConfig


@dataclass(frozen=True)
class Latents:
    """What a generator is asked for.

    Attributes:
        z: ``[B, d]``, standard normal marginals.
        labels: ``[B]``, in the classifier's own label space.
        index: sample index within the classifier's part of the global batch, ``[B]``.
        classifier: which classifier a sample is for, ``[B]``.
    """

    z: Tensor
    labels: Tensor
    index: Tensor
    classifier: Tensor

    def to(self, device: torch.device) -> Latents:
        """The same on ``device``."""
        return Latents(*(t.to(device) for t in (self.z, self.labels, self.index, self.classifier)))

    def __getitem__(self, part: slice) -> Latents:
        return Latents(self.z[part], self.labels[part], self.index[part], self.classifier[part])


def counted_uniforms(seed: int, step: int, start: int, stop: int, dimensions: int, stream: int = 0) -> np.ndarray:
    """Uniforms in [0, 1), ``[stop - start, dimensions]``: row i is a function of (seed, stream, step, i) alone (Philox counter)."""
    blocks = -(-dimensions // 4)  # one Philox count yields four 64-bit numbers
    bits = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).advance((stream << 128) + start * blocks)
    return np.random.Generator(bits).random((stop - start, 4 * blocks))[:, :dimensions]


def normal_quantiles(u: np.ndarray) -> Tensor:
    """Standard normal numbers at the quantiles ``u``, float64, finite also at u = 0."""
    quantiles: Tensor = torch.special.ndtri(torch.from_numpy(u).clamp(2.0**-53, 1 - 2.0**-53))
    return quantiles


class LatentSampler:
    """Draws any slice of one classifier's part of the global batch of any step. Labels cycle through the classes: y_i = i mod C.

    Args:
        config: how.
        classes: C.
        batch: samples of the part.
        steps: of the run.
        seed: of the run.
        classifier: its index; each has a stream of its own.
    """

    def __init__(
        self, config: LatentConfig, classes: int, batch: int, steps: int, seed: int, classifier: int = 0
    ) -> None:
        self.config, self.classes, self.seed, self.classifier = config, classes, seed, classifier
        self.bank_steps = round(config.bank_fraction * steps)
        self.points = None
        per_class = -(-batch // classes)
        if config.scheme != "normal":
            engine = SobolEngine(config.dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
            self.points = engine.draw(per_class, dtype=torch.float64).numpy()
        self.lattice = per_class if config.scheme == "stratified" else None

    def batch(self, step: int, start: int, stop: int) -> Latents:
        """Samples ``start`` to ``stop`` of the part at ``step`` (counted from 1)."""
        key = 0 if step <= self.bank_steps else step
        index = torch.arange(start, stop)
        dimensions, stream = self.config.dimensions, self.classifier
        if self.points is None:
            u = counted_uniforms(self.seed, key, start, stop, dimensions, stream)
        else:
            shifts = counted_uniforms(self.seed, key, 0, self.classes, dimensions, stream)
            place, label = index.numpy() // self.classes, index.numpy() % self.classes
            u = (self.points[place] + shifts[label]) % 1.0
            if self.lattice is not None:  # the shift moves a point within its own part of the lattice
                u[:, 0] = (place + shifts[label, 0]) / self.lattice
        return Latents(normal_quantiles(u), index % self.classes, index, torch.full_like(index, self.classifier))


def fresh_latents(seed: int, count: int, dimensions: int, classes: int, start: int = 0, classifier: int = 0) -> Latents:
    """Independent N(0, I) latents with cycling labels, for sampling after training; stream apart from training's."""
    u = counted_uniforms(seed, 2**64 - 1, start, start + count, dimensions, classifier)
    index = torch.arange(start, start + count)
    return Latents(normal_quantiles(u), index % classes, index, torch.full_like(index, classifier))
