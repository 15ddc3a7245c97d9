"""A trained generator and what sampling raw images from it needs: no classifier, no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.generators.latents import Latents, fresh_latents
from hpc_c2g.generators.networks import FreeImages, Generator
from hpc_c2g.kkt.margins import other_classes

SUPPORT = 0.7
"""A sample is supported if its multipliers reach this fraction of its class's mean."""

OVERSAMPLING = 8
CHUNK = 4096


@dataclass(frozen=True)
class Member:
    """One solution of one of a generator's classifiers.

    Attributes:
        index: Index of the member within the generator.
        classifier: Index of the classifier.
        classes: Names of the classes.
        normalization: Map between raw values and the generator's outputs for this member.
    """

    index: int
    classifier: int
    classes: list[str]
    normalization: Normalization


@dataclass(frozen=True)
class TrainedGenerator:
    """A trained generator that samples raw images.

    Attributes:
        module: Generator and multiplier network.
        dimensions: Dimension of the latents.
        members: Solutions of the classifiers, classifier by classifier.
    """

    module: Generator | FreeImages
    dimensions: int
    members: list[Member]

    @classmethod
    def of(
        cls, bundles: Sequence[Bundle], solutions: int, module: Generator | FreeImages, dimensions: int
    ) -> TrainedGenerator:
        """Wrap a generator in training; ``bundles`` holds one bundle per member, ``solutions`` consecutive ones per classifier."""
        members = [Member(i, i // solutions, b.classes, b.normalization) for i, b in enumerate(bundles)]
        return cls(module, dimensions, members)

    def only(self, classifier: int) -> TrainedGenerator:
        """Return the generator restricted to the members of one classifier."""
        return replace(self, members=[member for member in self.members if member.classifier == classifier])

    @property
    def classes(self) -> list[str]:
        """Names of all classes; classes with equal names are the same class."""
        return list(dict.fromkeys(name for member in self.members for name in member.classes))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``[*S]`` of one sample."""
        return tuple(self.members[0].normalization.mean.shape)

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint stores beside the weights."""
        names = ("mean", "scale", "lower", "upper")
        members = [
            {
                "classifier": m.classifier,
                "classes": list(m.classes),
                "normalization": {k: getattr(m.normalization, k) for k in names},
            }
            for m in self.members
        ]
        return {"dimensions": self.dimensions, "members": members}

    @torch.no_grad()
    def draw(self, latents: Latents, member: Member) -> tuple[Tensor, Tensor]:
        """Raw samples ``[n, *S]`` of one member and their relative multipliers sum_j softplus(h_ij) ``[n]``, on the CPU in float32."""
        device = next(self.module.parameters()).device
        images, weights = [], []
        for start in range(0, len(latents.labels), CHUNK):
            micro_batch = latents[start : start + CHUNK].to(device)
            x, h = self.module(micro_batch)
            h = h[:, : len(member.classes)].float()
            mu = F.softplus(h) * other_classes(micro_batch.labels, h.shape[1])
            images.append(member.normalization.denormalize(x.float().cpu()))
            weights.append(mu.sum(1).cpu())
        return torch.cat(images), torch.cat(weights)

    def sample(self, count: int, seed: int, drawing: str = "multipliers") -> tuple[Tensor, Tensor]:
        """Fresh raw samples ``[count, *S]`` with labels ``[count]`` (indices into ``classes``) that cycle through the classes.

        At a KKT point the sum over training samples is the expectation over the generator *weighted by its multipliers*: a
        sample without multipliers contributes nothing. So samples are drawn in proportion to their multipliers, by importance
        resampling within the class from ``OVERSAMPLING`` times as many. ``supported`` drops samples below ``SUPPORT`` times the
        mean multiplier and draws uniformly among the others; ``plain`` draws uniformly among all.
        """
        classes = self.classes
        drawn = [self._candidates(member, count, seed, drawing) for member in self.members]
        images, weights, candidate_labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        labels = torch.arange(count) % len(classes)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.empty(count, dtype=torch.long)
        for label in range(min(len(classes), count)):
            candidates = torch.nonzero(candidate_labels == label)[:, 0]
            wanted = torch.nonzero(labels == label)[:, 0]
            if drawing != "plain":
                picked = systematic_resample(_drawing_weights(weights[candidates], drawing), len(wanted), generator)
            else:
                picked = torch.arange(len(wanted)) % len(candidates)
                if len(self.members) > 1:  # candidates come member by member: take some of each
                    picked = torch.randperm(len(candidates), generator=generator)[picked]
            chosen[wanted] = candidates[picked]
        return images[chosen], labels

    def _candidates(self, member: Member, count: int, seed: int, drawing: str) -> tuple[Tensor, Tensor, Tensor]:
        """One member's samples, relative multipliers and labels in the common label space."""
        classes = len(member.classes)
        factor = 1 if drawing == "plain" else OVERSAMPLING
        total = factor * -(-count // len(self.classes)) * classes
        if isinstance(self.module, FreeImages):  # a finite set: every candidate once
            total = self.module.counts[member.index]
        latents = fresh_latents(seed, total, self.dimensions, classes, member=member.index)
        common = torch.tensor([self.classes.index(name) for name in member.classes])
        return *self.draw(latents, member), common[latents.labels]

    def picture(self, seed: int, rows: int = 10) -> tuple[Tensor, int]:
        """Raw samples for a grid at fixed latents, a column per class, classifier by classifier; and the number of columns.

        Rows alternate between the solutions of a classifier.
        """
        parts: dict[int, list[Tensor]] = {}
        for member in self.members:
            columns = len(member.classes)
            latents = fresh_latents(seed, rows * columns, self.dimensions, columns, member=member.index)
            drawn = self.draw(latents, member)[0].reshape(rows, columns, *self.input_shape)
            parts.setdefault(member.classifier, []).append(drawn)
        row = torch.arange(rows)
        images = torch.cat([torch.stack(own)[row % len(own), row] for own in parts.values()], 1)
        return images.flatten(0, 1), images.shape[1]


def _drawing_weights(weights: Tensor, drawing: str) -> Tensor:
    """Drawing weights of one class's candidates with relative multipliers ``[n]``; not all zero unless all multipliers are."""
    if drawing == "supported":
        return (weights >= SUPPORT * weights.mean()).to(weights)
    return weights


def systematic_resample(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Systematic resampling: ``count`` shuffled indices, index i on average count w_i / sum w times."""
    cumulative = weights.double().clamp_min(0).cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(count, dtype=torch.float64) + offset) / count * cumulative[-1]
    drawn = torch.searchsorted(cumulative, points, right=True).clamp(max=len(weights) - 1)
    return drawn[torch.randperm(count, generator=generator)]


def members_from(state: Mapping[str, Any]) -> list[Member]:
    """Restore the members from ``TrainedGenerator.state_dict``."""
    return [
        # checkpoints without solutions have one member per classifier
        Member(i, kept.get("classifier", i), kept["classes"], Normalization(**kept["normalization"]))
        for i, kept in enumerate(state["members"])
    ]
