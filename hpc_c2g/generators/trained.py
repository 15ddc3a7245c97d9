"""A trained generator with all that is needed to sample raw images from it: no classifier, no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.classifiers.normalisation import Normalisation
from hpc_c2g.generators.latents import Latents, fresh_latents
from hpc_c2g.generators.networks import FreeImages, Generator
from hpc_c2g.kkt.margins import other_classes

OVERSAMPLING = 8
CHUNK = 4096


@dataclass(frozen=True)
class TrainedGenerator:
    """Samples raw images.

    Attributes:
        module: generator and multiplier network.
        dimensions: of its latents.
        classes: names.
        normalisation: maps its outputs to raw values.
    """

    module: Generator | FreeImages
    dimensions: int
    classes: list[str]
    normalisation: Normalisation

    @classmethod
    def of(cls, bundle: Bundle, module: Generator | FreeImages, dimensions: int) -> TrainedGenerator:
        """For a generator in training against ``bundle``."""
        return cls(module, dimensions, bundle.classes, bundle.normalisation)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``[*S]`` of one sample."""
        return tuple(self.normalisation.mean.shape)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        norm = {k: getattr(self.normalisation, k) for k in ("mean", "scale", "lower", "upper")}
        return {"classes": list(self.classes), "dimensions": self.dimensions, "normalisation": norm}

    @torch.no_grad()
    def draw(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Raw samples ``[n, *S]`` and their total relative multipliers sum_j softplus(h_ij) ``[n]``, on the CPU in float32."""
        device = next(self.module.parameters()).device
        images, weights = [], []
        for start in range(0, len(latents.labels), CHUNK):
            piece = Latents(*(t[start : start + CHUNK].to(device) for t in (latents.z, latents.labels, latents.index)))
            x, h = self.module(piece)
            mu = F.softplus(h.float()) * other_classes(piece.labels, h.shape[1])
            images.append(self.normalisation.denormalise(x.float().cpu()))
            weights.append(mu.sum(1).cpu())
        return torch.cat(images), torch.cat(weights)

    def sample(self, count: int, seed: int, by_multipliers: bool = True) -> tuple[Tensor, Tensor]:
        """Fresh raw samples ``[count, *S]`` with labels ``[count]`` cycling through the classes.

        At a KKT point the sum over training samples is the expectation over the generator *weighted by its multipliers*: a
        sample without multipliers satisfies nothing. So samples are drawn in proportion to their multipliers, by importance
        resampling within the class from ``OVERSAMPLING`` times as many; ``by_multipliers=False`` draws plainly.
        """
        classes = len(self.classes)
        factor = OVERSAMPLING if by_multipliers else 1
        if isinstance(self.module, FreeImages):  # a finite set: every candidate once
            total = len(self.module.image) if by_multipliers else count
        else:
            total = factor * -(-count // classes) * classes
        latents = fresh_latents(seed, total, self.dimensions, classes)
        images, weights = self.draw(latents)
        labels = torch.arange(count) % classes
        if not by_multipliers:
            return images[:count], labels
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.empty(count, dtype=torch.long)
        for label in range(min(classes, count)):
            candidates = torch.nonzero(latents.labels == label)[:, 0]
            wanted = torch.nonzero(labels == label)[:, 0]
            drawn = systematic_resample(weights[candidates], len(wanted), generator)
            chosen[wanted] = candidates[drawn]
        return images[chosen], labels

    def picture(self, seed: int, rows: int = 10) -> tuple[Tensor, int]:
        """Raw samples for a grid, one column per class at latents that never change, and the number of columns."""
        columns = len(self.classes)
        images, _ = self.draw(fresh_latents(seed, rows * columns, self.dimensions, columns))
        return images, columns


def systematic_resample(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices, index i on average count w_i / sum w times, by one random offset and equal steps; shuffled."""
    cumulative = weights.double().clamp_min(0).cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(count, dtype=torch.float64) + offset) / count * cumulative[-1]
    drawn = torch.searchsorted(cumulative, points, right=True).clamp(max=len(weights) - 1)
    return drawn[torch.randperm(count, generator=generator)]


def normalisation_from(state: Mapping[str, Any]) -> Normalisation:
    """The normalisation that ``TrainedGenerator.state_dict`` kept."""
    return Normalisation(**state["normalisation"])
