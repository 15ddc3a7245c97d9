"""Training steps in float64 for tests: one classifier or several, in one process or on ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hpc_c2g.classifiers.bundle import Bundle, build_model
from hpc_c2g.classifiers.normalization import Normalization
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.world import World
from hpc_c2g.generators import networks
from hpc_c2g.generators.config import LATENT_DIMENSIONS, FreeImagesConfig, MLPGeneratorConfig
from hpc_c2g.generators.networks import OUTPUT_SCALE, build_generator
from hpc_c2g.training.config.objective import DualityConfig, PriorConfig, StationarityConfig
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.step.bundles import boxes, class_counts
from hpc_c2g.training.step.sharding import batch_shares
from hpc_c2g.training.step.train_step import TrainStep

BATCH, ALPHA0 = 12, 0.5
GENERATORS = {
    "codes": MLPGeneratorConfig(codes=2, widths=[9]),
    "no codes": MLPGeneratorConfig(codes=0, widths=[9]),
    "free": FreeImagesConfig(name="free", start=0.1),
}

SHAPE = (1, 4, 4)
NORMED = {
    "mlp": {"target": "mlp", "width": 7, "depth": 3, "bias": "first"},
    "cnn": {"target": "cnn", "width": 3, "depth": 3, "bias": "all"},
    "residual": {"target": "residual_cnn", "width": 2, "depth": 1, "bias": "first"},
}


class PlainEngine:
    """The least that a step needs: float64, autograd, an optimizer, a sum over ranks."""

    gathers_in_forward = False

    def __init__(
        self, module: nn.Module, world: World, optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    ) -> None:
        self.module, self.world = module.double(), world
        self.optimizer = optimizer(module.parameters(), lr=0.01)
        self.backwards = self.steps = 0
        self.gradients: list[Tensor] = []

    def backward(self, surrogate: Tensor) -> None:
        self.backwards += 1
        surrogate.backward()

    def reduce(self) -> None:
        self.world.sum([p.grad for p in self.module.parameters()])

    def gradient_norm(self) -> Tensor:
        return get_total_norm([p.grad for p in self.module.parameters()])

    def step(self, lr_factor: float) -> None:
        self.steps += 1
        self.gradients = [p.grad.clone() for p in self.module.parameters()]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


def three_bundles() -> list[Bundle]:
    """Classifiers with different architectures, class sets, label spaces and normalizations, and one input shape."""
    shape = list(SHAPE)
    kinds = [
        ({"target": "mlp", "input_shape": shape, "classes": 3, "width": 12, "bias": "first"}, "abc", 0.4),
        ({"target": "cnn", "input_shape": shape, "classes": 2, "width": 4, "depth": 2, "bias": "all"}, "bd", 0.5),
        ({"target": "mlp", "input_shape": shape, "classes": 4, "width": 9, "depth": 3, "bias": "none"}, "efgh", 0.3),
    ]
    bundles = []
    generator = torch.Generator().manual_seed(0)
    for architecture, classes, mean in kinds:
        model = build_model(architecture).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        normalization = Normalization.constant(tuple(shape), mean=mean)
        bundles.append(Bundle(model, architecture, list(classes), tuple(shape), normalization))
    return bundles


def normed(kind: str = "mlp", classes: int = 3, **changes: object) -> Bundle:
    """A random classifier with BatchNorm whose running statistics are some batch's."""
    architecture = {**NORMED[kind], "input_shape": list(SHAPE), "classes": classes, "batch_norm": True, **changes}
    model = build_model(architecture).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        model.train()(torch.randn(20, *SHAPE, generator=generator, dtype=torch.float64))
    names = [str(c) for c in range(classes)]
    return Bundle(model.eval(), architecture, names, SHAPE, Normalization.constant(SHAPE, mean=0.4))


def config(micro_batch: int | None = None, generator: str = "codes", **changes) -> TrainConfig:
    """Every term at work."""
    everything = TrainConfig(
        steps=10,
        global_batch=BATCH,
        micro_batch=micro_batch,
        generator=GENERATORS[generator],
        stationarity=StationarityConfig(weight=1.3),
        duality=DualityConfig(feasibility=0.3, slackness=0.2),
        prior=PriorConfig(total_variation=0.1, mean=0.3, deviation=0.2),
    )
    return dataclasses.replace(everything, **changes)


def trainer(bundles: Sequence[Bundle], settings: TrainConfig, world: World | None = None, **engine) -> TrainStep:
    """A step in float64 over ``world``, with a generator away from its start, where all multipliers are alike."""
    world = world or World.single_process(torch.device("cpu"))
    if len(bundles) > 1:
        settings = dataclasses.replace(settings, classifier=[f"classifier {k}" for k in range(len(bundles))])
    classes = class_counts(bundles)
    mesh = Mesh.over(world, len(bundles), settings.distributed.groups, settings.distributed.hierarchical)
    batches, dimensions = batch_shares(settings, classes), LATENT_DIMENSIONS
    with mock.patch.object(networks, "EMBEDDING", 5):  # small
        module = build_generator(settings.generator, dimensions, classes, batches, *boxes(bundles), settings.seed)
    if not isinstance(settings.generator, FreeImagesConfig):
        with torch.no_grad():
            module.image[0][-1].weight.mul_(4.0 / OUTPUT_SCALE)
            module.multiplier.apply(lambda m: m.weight.add_(0.3) if isinstance(m, nn.Embedding) else None)
    alpha0 = [ALPHA0] * len(bundles)
    return TrainStep.build(
        settings,
        bundles,
        PlainEngine(module, world, **engine),
        mesh,
        alpha0,
        micro_batch=settings.micro_batch,
        dtype=torch.float64,
    )
