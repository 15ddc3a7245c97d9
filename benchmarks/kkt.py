"""One KKT gradient (G, residual, cotangents of x and mu) in every way that the toolkit has, and its floor: the matrix products alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.distributed.comm_stream import CommStream
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import ResidualSum
from hpc_c2g.distributed.world import World
from hpc_c2g.kkt.stationarity import cotangents
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.step.objective import Objective

GAMMA, ALPHA = 0.1, -1.0
Gradient = tuple[Tensor, Tensor]
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest relative error against float64 at which a way may be timed."""


@dataclass(frozen=True)
class Samples:
    """A batch: x, labels, mu."""

    x: Tensor
    labels: Tensor
    multipliers: Tensor

    @classmethod
    def random(cls, bundle: Bundle, batch: int, device: torch.device, dtype: torch.dtype) -> Samples:
        """Noise in the input's range, with cycling classes."""
        generator, classes = torch.Generator().manual_seed(0), len(bundle.classes)
        labels = torch.arange(batch) % classes
        others = labels[:, None] != torch.arange(classes)
        x = torch.randn(batch, *bundle.input_shape, generator=generator)
        mu = torch.rand(batch, classes, generator=generator) * others / batch
        return cls(x.to(device, dtype), labels.to(device), mu.to(device, dtype))

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """A micro-batch as leaves: x, labels, mu."""
        x, mu = (t[start:stop].detach().requires_grad_() for t in (self.x, self.multipliers))
        return x, self.labels[start:stop], mu


def objective_of(
    bundle: Bundle, batch: int, device: torch.device, dtype: torch.dtype = torch.float32, **settings: str
) -> Objective:
    """The frozen side with these settings of a run (``kkt_backend``, ``matmul_precision``)."""
    config = TrainConfig(classifier="-", run_dir="-", global_batch=batch)
    return Objective(bundle, replace(config, **settings), batch, device, dtype)  # type: ignore[arg-type]


def one_pass(objective: Objective, samples: Samples) -> Gradient:
    """The graph of the whole batch is kept from G to the cotangents."""
    x, labels, mu = samples.part(0, len(samples.x))
    margins, G = objective.kkt_backend(GAMMA).kkt_sum(x, labels, mu, keep_graph=True)
    gx, gmu = cotangents(G, objective.residual(G, ALPHA).direction, [x, mu], _loss(margins))
    return gx, gmu


def sum_of(objective: Objective) -> ResidualSum:
    """Adds up G over micro-batches as a training step of one process does, in memory that it keeps."""
    device = next(iter(objective.theta.values())).device
    return ResidualSum(
        objective.theta, Mesh.over(World.single_process(device), 1), CommStream(device), "float32", 4 * 2**20
    )


def two_passes(objective: Objective, samples: Samples, micro_batch: int, G: ResidualSum) -> Gradient:
    """As a training step does it: G micro-batch by micro-batch, the last one's graph kept, the others recomputed for their cotangents."""
    micro_batches = [(i, min(i + micro_batch, len(samples.x))) for i in range(0, len(samples.x), micro_batch)]
    backend = objective.kkt_backend(GAMMA)
    for piece in micro_batches:
        last = piece == micro_batches[-1]
        x, labels, mu = samples.part(*piece)
        on_ready = G.micro_batch(last)
        margins, own = backend.kkt_sum(x, labels, mu, keep_graph=last, on_ready=on_ready)
        G.add(own)
    residual = objective.residual(G.total(), ALPHA)
    backend.set_direction(residual.direction, lambda margins, *_: _loss(margins))
    found = [cotangents(own, residual.direction, [x, mu], _loss(margins))]
    for piece in reversed(micro_batches[:-1]):
        x, labels, mu = samples.part(*piece)
        margins, product = backend.directional_sum(x, labels, mu)
        found.append(cotangents({"": product}, {"": torch.ones_like(product)}, [x, mu], _loss(margins)))
    gx, gmu = (torch.cat(parts) for parts in zip(*reversed(found), strict=True))
    return gx, gmu


def _loss(margins: Tensor) -> Tensor:
    """A plain sum over samples, as feasibility is."""
    return (1 - math.exp(ALPHA) * margins).relu().square().sum()


def error(found: Gradient, reference: Gradient) -> float:
    """The larger relative error of the two cotangents; nan where one of them is."""
    pairs = zip(found, reference, strict=True)
    return float(torch.stack([(a.double() - b.double()).norm() / b.double().norm() for a, b in pairs]).amax())


def refuse_wrong(errors: Mapping[str, float]) -> None:
    """End the benchmark where a way, named ``PRECISION...`` or else in float32, is not the gradient of float64 (nan is not).

    Raises:
        SystemExit: naming the ways and their errors.
    """
    limits = {name: TOLERANCE["bfloat16" if name.startswith("bfloat16") else "float32"] for name in errors}
    wrong = {name: e for name, e in errors.items() if not e <= limits[name]}
    if wrong:
        sys.exit(f"not the gradient of float64: {wrong}")


def products(bundle: Bundle, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """The matrix products that no way of one pass can spare, on operands of their shapes, and their operations.

    Per linear map forward, G and the backward of both inside and outside: a W^T, D^T a, a V^T, D V, z W; behind the first also D W and
    (s T) W^T.

    Raises:
        ValueError: the classifier has other maps than linear ones.
    """
    maps = [m for m in bundle.model.modules() if isinstance(m, nn.Linear)]
    if len(maps) < sum(p.ndim > 1 for p in bundle.model.parameters()):
        raise ValueError("the floor is known for fully connected nets alone")
    operands = [
        (
            torch.randn(batch, m.in_features, device=device).to(dtype),
            torch.randn(batch, m.out_features, device=device).to(dtype),
            torch.randn(m.out_features, m.in_features, device=device).to(dtype),
        )
        for m in maps
    ]

    def call() -> None:
        for i, (a, delta, weight) in enumerate(operands):
            for _ in range(2 if i == 0 else 3):
                a @ weight.T
            delta.T @ a
            for _ in range(2 if i == 0 else 3):
                delta @ weight

    counts = [5, *([7] * (len(maps) - 1))]
    return call, sum(2.0 * n * batch * m.in_features * m.out_features for n, m in zip(counts, maps, strict=True))
