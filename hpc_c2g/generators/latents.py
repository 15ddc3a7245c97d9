"""Latents z, keyed by (seed, step, sample index): the same samples whatever the number of processes or micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from hpc_c2g.generators.config import SCHEMES

TRAINING_SCHEME = "stratified"


@dataclass(frozen=True)
class Latents:
    """Input of a generator: latents, labels and members of the samples.

    Attributes:
        z: Latents ``[B, d]``, standard normal marginals.
        labels: Labels ``[B]``, in the classifier's own label space.
        index: Sample index within the member's part of the global batch, ``[B]``.
        member: Index of the member that a sample is for, ``[B]``.
    """

    z: Tensor
    labels: Tensor
    index: Tensor
    member: Tensor

    def to(self, device: torch.device) -> Latents:
        """Copy to ``device``."""
        return Latents(*(t.to(device) for t in (self.z, self.labels, self.index, self.member)))

    def __getitem__(self, part: slice) -> Latents:
        return Latents(self.z[part], self.labels[part], self.index[part], self.member[part])


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
    """Sampler of any slice of one member's part of the global batch at any step. Labels cycle through the classes: y_i = i mod C.

    Args:
        dimensions: Number of latent coordinates d.
        classes: C, the number of classes.
        batch: Number of samples of the part.
        seed: Seed of the run.
        member: Index of the member; each has its own random stream.
        scheme: ``sobol``: one scrambled Sobol set, shifted mod 1 at random per class; ``stratified``: the same, but the first
            coordinate is an even lattice, so that codes are met equally often; ``normal``: independent.

    Raises:
        ValueError: Unknown scheme.
    """

    def __init__(
        self, dimensions: int, classes: int, batch: int, seed: int, member: int = 0, scheme: str = TRAINING_SCHEME
    ) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r} is unknown: choose one of {', '.join(SCHEMES)}")
        self.dimensions, self.classes, self.seed, self.member = dimensions, classes, seed, member
        self.points = None
        per_class = -(-batch // classes)
        if scheme != "normal":
            engine = SobolEngine(dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
            self.points = engine.draw(per_class, dtype=torch.float64).numpy()
        self.lattice = per_class if scheme == "stratified" else None

    def batch(self, step: int, start: int, stop: int) -> Latents:
        """Samples ``start`` to ``stop`` of the part at ``step`` (counted from 1)."""
        index = torch.arange(start, stop)
        if self.points is None:
            u = counted_uniforms(self.seed, step, start, stop, self.dimensions, self.member)
        else:
            shifts = counted_uniforms(self.seed, step, 0, self.classes, self.dimensions, self.member)
            place, label = index.numpy() // self.classes, index.numpy() % self.classes
            u = (self.points[place] + shifts[label]) % 1.0
            if self.lattice is not None:  # the shift moves a point within its own part of the lattice
                u[:, 0] = (place + shifts[label, 0]) / self.lattice
        return Latents(normal_quantiles(u), index % self.classes, index, torch.full_like(index, self.member))


def fresh_latents(seed: int, count: int, dimensions: int, classes: int, start: int = 0, member: int = 0) -> Latents:
    """Independent N(0, I) latents with cycling labels, for sampling after training; their random stream differs from training's."""
    u = counted_uniforms(seed, 2**64 - 1, start, start + count, dimensions, member)
    index = torch.arange(start, start + count)
    return Latents(normal_quantiles(u), index % classes, index, torch.full_like(index, member))
