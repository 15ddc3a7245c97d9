"""Cost of a training step, from the step itself: it runs on the meta device, where nothing is computed and nothing is stored.

The real ``TrainStep`` is called with 2 and with 3 micro-batches. All it does is affine in their number m, so with W(m) the work,

    per micro-batch W(3) - W(2),    once per step W(2) - 2 (W(3) - W(2)),

and what a step saves that keeps its last micro-batch is what it takes less than one that does not.

The bytes that live at once do not grow with m; they are (piecewise) affine in the samples of a micro-batch. What the kernels of
operators allocate for themselves is not seen: up to a fifth more for convolutions of tiny maps, a twentieth on 28 x 28.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.distributed.comm_stream import CommStream
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.reduction import ResidualSum, RunningSum
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.generators.config import LATENT_DIMENSIONS
from hpc_c2g.generators.latents import Latents
from hpc_c2g.generators.networks import FreeImages, Generator, build_generator
from hpc_c2g.training.config.train import DistributedConfig, OptimizerConfig, TrainConfig
from hpc_c2g.training.cost.op_counter import Op, OpCost, OpCounter
from hpc_c2g.training.engines.adam_engine import build_optimizer
from hpc_c2g.training.step.bundles import boxes, class_counts
from hpc_c2g.training.step.objective import Objective
from hpc_c2g.training.step.sharding import batch_shares
from hpc_c2g.training.step.train_step import TrainStep

META = torch.device("meta")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MicroBatchCost:
    """Cost of a rank's step in terms of its micro-batches.

    Attributes:
        samples: in a micro-batch.
        one_pass: the share of a rank is one micro-batch, whose graph is kept from the KKT sum to the cotangents.
        first: per micro-batch of pass 1, the KKT sum without a graph; nothing where there is one pass.
        second: per micro-batch of pass 2: generator, KKT sum with graph, cotangents, backward.
        backward: the part of ``second`` that is the generator's backward.
        saved: once per step: what need not be done again for the micro-batch whose graph is kept until G is known.
        residual: once per step: the bucket of the all-reduce, residual and direction.
        update: once per step: the generator's gradient bucket, its norm, Adam.
        sums: bytes of the all-reduces in the order of the step, without the generator's gradient.
        working_bytes: most bytes alive at once, besides the classifier's weights and the generator's weights, gradient and moments.
        classifier_parameters: P.
        generator_parameters: P_gen.
        operators: of a step, and how often it calls each.
    """

    samples: int
    one_pass: bool
    first: OpCost
    second: OpCost
    backward: OpCost
    saved: OpCost
    residual: OpCost
    update: OpCost
    sums: tuple[int, ...]
    working_bytes: int
    classifier_parameters: int
    generator_parameters: int
    operators: tuple[tuple[Op, int], ...] = ()


class DryRun:
    """A run's classifier and generator on the meta device, ready to be costed at any micro-batch.

    Products are counted in float32, everything else as configured.

    Args:
        bundle: the classifier.
        config: of the run; its batch sizes do not matter here, except for the number of free images.
    """

    def __init__(self, bundle: Bundle, config: TrainConfig) -> None:
        self.bundle = bundle
        self.config = replace(
            config, classifier="dry run", solutions=1, shares=[], deterministic=False, matmul_precision="float32"
        )
        with OpCounter():
            self.objective = Objective(bundle, self.config, config.global_batch, META, torch.float32)
        self.build = functools.partial(generator_without_numbers, self.config, [bundle])

    def cost(self, samples: int, one_pass: bool = False) -> MicroBatchCost:
        """The cost of micro-batches of ``samples``, more than one of them unless ``one_pass``.

        Raises:
            UserError: ``samples`` below 1.
        """
        if samples < 1:
            raise UserError(f"micro_batch={samples} is too small", "give at least one sample")
        if one_pass:
            return self._difference(samples, self._trace(samples, 1))
        two, three = (self._trace(samples, count, keeps_last=False) for count in (2, 3))
        return self._difference(samples, self._trace(samples, 2), two, three)

    def working_bytes(self, samples: int, one_pass: bool = False) -> int:
        """That entry of ``cost`` alone, in less time."""
        return self._trace(samples, 1 if one_pass else 2).meter.peak

    def _trace(self, samples: int, micro_batches: int, keeps_last: bool = True) -> CostTracer:
        count = samples * micro_batches
        config = replace(self.config, global_batch=count, micro_batch=samples, distributed=DistributedConfig())
        meter = OpCounter()
        run = CostTracer(meter, self.build(), config.optimizer, config.zero_stage == 3)
        mesh = Mesh.over(World.single_process(META), 1)

        def marked_sum(config: TrainConfig, mesh: Mesh, objective: Objective, comm_stream: CommStream) -> ResidualSum:
            return _MarkedSum(run, objective, mesh, comm_stream)

        with meter:
            run.optimizer.step()  # Adam makes its moments in its first step
            run.clear()
            step = TrainStep.build(
                config,
                [self.bundle],
                run,
                mesh,
                [0.0],
                micro_batch=samples,
                objectives={0: self.objective.under(config, count)},
                sampler=lambda _: _Latents(LATENT_DIMENSIONS),
                residual_sum=marked_sum,
                scalar_sum=lambda *_: _Sum(run),
                keep_last_graph=keeps_last,
            )
            step(1)
            run.mark()
        return run

    def _difference(
        self, samples: int, real: CostTracer, two: CostTracer | None = None, three: CostTracer | None = None
    ) -> MicroBatchCost:
        """Cost from a dry run as it is, with one micro-batch or two, and of two others that keep no micro-batch."""
        sizes = {
            "samples": samples,
            "one_pass": three is None,
            "sums": tuple(real.sums),
            "working_bytes": real.meter.peak,
            "classifier_parameters": sum(t.numel() for t in self.objective.theta.values()),
            "generator_parameters": sum(p.numel() for p in real.module.parameters()),
            "operators": tuple(real.meter.operators.items()),
            "backward": real.backward_work,
            "update": real.phases[2],
        }
        if two is None or three is None:
            second = real.phases[0] + real.phases[1]
            return MicroBatchCost(first=OpCost(), second=second, saved=OpCost(), residual=OpCost(), **sizes)  # type: ignore[arg-type]
        first, second = (b - a for a, b in zip(two.phases[:2], three.phases[:2], strict=True))
        residual = two.phases[0] + two.phases[1] - (first + second) * 2
        saved = two.phases[0] + two.phases[1] - (real.phases[0] + real.phases[1])
        return MicroBatchCost(first=first, second=second, saved=saved, residual=residual, **sizes)  # type: ignore[arg-type]


def largest_micro_batch(working_bytes: Callable[[int], float], available_bytes: float, limit: int) -> int:
    """The largest power of two, or ``limit`` itself, whose working bytes fit; 0 where one sample does not.

    Working bytes are convex in the samples b, the maximum of phases f + s b. So a chord between a size that fits and one that does
    not lies above them: the size where it crosses ``available_bytes`` fits, and a few chords find the largest.

    Args:
        working_bytes: of a micro-batch of so many samples, such as ``DryRun(bundle, config).working_bytes``.
        available_bytes: for everything that lives only within a step.
        limit: no more than this, a rank's share of the batch.
    """
    at = functools.cache(working_bytes)
    if at(limit) <= available_bytes:
        return limit
    fits, too_large = 1, limit
    if at(fits) > available_bytes:
        return 0
    while 2 * fits < too_large:
        slope = (at(too_large) - at(fits)) / (too_large - fits)
        reached = _power_of_two(fits + (available_bytes - at(fits)) / slope)
        candidate = max(2 * fits, min(reached, _power_of_two(too_large - 1)))
        if at(candidate) <= available_bytes:
            fits = candidate
        else:
            too_large = candidate
    return fits


def _power_of_two(number: float) -> int:
    """The largest one that is not above ``number``."""
    return 1 << (int(number).bit_length() - 1)


class CostTracer:
    """An engine that does nothing but what costs: the parts of a step that the meta device cannot play."""

    module: nn.Module

    def __init__(
        self, meter: OpCounter, module: Generator | FreeImages, optimizer: OptimizerConfig, gathers_in_forward: bool
    ) -> None:
        self.meter, self.module, self.gathers_in_forward = meter, module, gathers_in_forward
        self.optimizer = build_optimizer(module, optimizer)
        self.parameters = list(module.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.clear()

    def clear(self) -> None:
        """Forget all that was counted."""
        self.phases: list[OpCost] = []
        self.sums: list[int] = []
        self.backward_work = OpCost()
        self.meter.reset()

    def mark(self) -> None:
        """A phase of the step ends here."""
        done = sum(self.phases, OpCost())
        self.phases.append(self.meter.work - done)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """An all-reduce."""
        self.sums.append(sum(t.numel() * t.element_size() for t in tensors))

    def gradient_norm(self) -> Tensor:
        """As the engine's."""
        return get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def backward(self, surrogate: Tensor) -> None:
        """As the engine's."""
        before = self.meter.work
        (surrogate * 1.0).backward()  # type: ignore[no-untyped-call]
        self.backward_work = self.meter.work - before

    def reduce(self) -> None:
        """DeepSpeed sums the gradient in one flat bucket."""
        self.mark()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        bucket = torch.cat([g.reshape(-1) for g in gradients]).div_(1.0)
        for gradient, part in zip(gradients, torch.split(bucket, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def step(self, lr_factor: float) -> None:
        """Adam; the gradients stay, as they are no working memory."""
        self.optimizer.step()


class _MarkedSum(ResidualSum):
    """The residual's sum over ranks ends the first phase; it is not sent."""

    def __init__(self, run: CostTracer, objective: Objective, mesh: Mesh, comm_stream: CommStream) -> None:
        super().__init__(objective.theta, mesh, comm_stream, "float32", 2**62)
        self.run = run

    def total(self) -> dict[str, Tensor]:
        """The sum over micro-batches."""
        self.run.mark()
        self.run.sum([bucket.flat for bucket in self.buckets])
        return super().total()


class _Sum(RunningSum):
    """A sum of scalars that is not sent."""

    def __init__(self, run: CostTracer) -> None:
        super().__init__(World.single_process(META))
        self.run = run

    def total(self) -> dict[str, Tensor]:
        """The sum over micro-batches."""
        self.run.sum(self.sums.values())
        return super().total()


class _Latents:
    """A sampler of latents without numbers."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def batch(self, step: int, start: int, stop: int) -> Latents:
        """As ``LatentSampler.batch``."""
        index = torch.empty(stop - start, dtype=torch.int64, device=META)
        z = torch.empty(stop - start, self.dimensions, dtype=torch.float64, device=META)
        return Latents(z, index, index, index)


def generator_without_numbers(config: TrainConfig, bundles: Sequence[Bundle]) -> Generator | FreeImages:
    """The run's generator of these classifiers on the meta device."""
    lower, upper = boxes(bundles)
    latents, classes = LATENT_DIMENSIONS, class_counts(bundles)
    counts = batch_shares(config, classes) if len(bundles) > 1 else [config.global_batch]
    module = build_generator(config.generator, latents, classes, counts, lower, upper, config.seed)
    return module.to(META, DTYPES[config.dtype])
