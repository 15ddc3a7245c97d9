"""The KKT sum of a trained generator as a mean of summands, one per sample, in the norm of the loss. Uses no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpc_c2g.bound import concentration
from hpc_c2g.bound.config import INDEPENDENT
from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.errors import UserError
from hpc_c2g.generators.config import LATENT_DIMENSIONS
from hpc_c2g.generators.latents import Latents, LatentSampler, counted_uniforms, normal_quantiles
from hpc_c2g.generators.networks import FreeImages
from hpc_c2g.kkt import duality, stationarity
from hpc_c2g.kkt.normalization import couples
from hpc_c2g.training.results import Run
from hpc_c2g.training.step.objective import Objective
from hpc_c2g.training.step.schedules import gate_width

APART = 2**62
"""First step number of the draws, above any run's: they never repeat the latents of training."""
ROWS, ELEMENTS = 16, 2**24
"""Largest number of per-sample gradients held at a time, and of their elements."""


def drawing(scheme: str, classes: int, batch: int, seed: int, classifier: int) -> Callable[[int], Latents]:
    """Return a function from a draw number to a batch of latents, independent between numbers and batch sizes.

    Args:
        scheme: One of ``DRAWS``.
        classes: C, the number of classes.
        batch: B, the batch size.
        seed: Seed of the draws.
        classifier: Index of the member.
    """
    first = APART + (batch << 24)
    if scheme == INDEPENDENT:

        def independent(number: int) -> Latents:
            u = counted_uniforms(seed, APART + first + number, 0, batch, LATENT_DIMENSIONS + 1, classifier)
            index, labels = torch.arange(batch), torch.from_numpy((u[:, 0] * classes).astype("int64"))
            return Latents(normal_quantiles(u[:, 1:]), labels, index, torch.full_like(index, classifier))

        return independent
    sampler = LatentSampler(LATENT_DIMENSIONS, classes, batch, seed, classifier, scheme)
    return lambda number: sampler.batch(first + number, 0, batch)


class Summands:
    """g_i = S sum_j softplus(h_ij) grad m_ij of one member at a run's newest checkpoint, with its alpha and gates, in float64.

    A lattice of a multiple of ``period`` samples meets every code of every class equally often.
    Vectors ``[P]`` concatenate e^(a (1 - lambda_k)) sqrt(w_k) G_k over k, so that L_stat = ||left - G||^2 with plain norms.

    Args:
        run: Trained run of a generator other than free images.
        bundle: Bundle of the classifier.
        classifier: Index of the member.
        device: Device of the computation.
        micro_batch: Samples per backward.

    Raises:
        UserError: the run has free images, which are no distribution, or batch statistics couple the samples.
    """

    def __init__(self, run: Run, bundle: Bundle, classifier: int, device: torch.device, micro_batch: int) -> None:
        if isinstance(run.generator.module, FreeImages):
            raise UserError(
                f"run_dir={run.config.run_dir} holds generator=free: its images are the batch, there is no expectation",
                "give a run with generator=mlp or conv",
            )
        if couples(bundle.model, run.config.stationarity.statistics):
            raise UserError(
                f"run_dir={run.config.run_dir} has stationarity.statistics={run.config.stationarity.statistics} and classifier"
                f" {run.config.members[classifier]} a BatchNorm: its KKT sum is no mean over independent samples",
                "give a run with stationarity.statistics=frozen, or of a classifier without BatchNorm",
            )
        self.classifier, self.micro_batch = classifier, micro_batch
        self.module = run.generator.module.to(device, torch.float64)
        self.objective = objective = Objective(bundle, run.config, 1, device, torch.float64)
        self.classes, self.alpha = objective.classes, run.alphas[classifier]
        self.period = self.classes * max(1, run.config.generator.codes)
        self.gamma = gate_width(run.step, run.config.steps)
        self.phi, self.theta = objective.at_gates(self.gamma), objective.theta
        self.scale = objective.multiplier_scale(self.alpha)
        rates, c = objective.rates, objective.left_side
        roots = {k: math.sqrt(w) for k, w in objective.weights(self.alpha).items()}
        self.factors = {k: roots[k] * math.exp(self.alpha * (1 - rates[k])) for k in roots}
        self.left = torch.cat(
            [(roots[k] * c[k] * math.exp(self.alpha * rates[k]) * t).flatten() for k, t in self.theta.items()]
        )

    def mean(self, latents: Latents) -> Tensor:
        """G(B) ``[P]`` over all samples of ``latents``, micro-batch by micro-batch without a graph."""
        total, batch = torch.zeros_like(self.left), len(latents.labels)
        for x, labels, mu in self._samples(latents, batch):
            G = stationarity.kkt_sum(self.phi, self.theta, x, labels, mu)[1]
            total += torch.cat([self.factors[k] * t.flatten() for k, t in G.items()])
        return total

    def each(self, latents: Latents) -> Iterator[Tensor]:
        """Yield all g_i in blocks ``[b, P]``."""
        rows = max(1, min(ROWS, ELEMENTS // len(self.left)))
        for samples in self._samples(latents, 1):
            for x, labels, mu in zip(*(torch.split(t, rows) for t in samples), strict=True):
                g = concentration.sample_gradients(self.phi, self.theta, x, labels, mu)
                yield torch.cat([self.factors[k] * t.flatten(1) for k, t in g.items()], 1)

    @torch.no_grad()
    def _samples(self, latents: Latents, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield x, labels and mu = S / batch softplus(h) of each micro-batch."""
        for start in range(0, len(latents.labels), self.micro_batch):
            micro_batch = latents[start : start + self.micro_batch].to(self.left.device)
            x, h = self.module(micro_batch)
            yield (
                x,
                micro_batch.labels,
                duality.multipliers_from(h[:, : self.classes], micro_batch.labels, self.scale, batch),
            )
