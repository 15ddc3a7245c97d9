"""Cost of a training step, measured by running the step on the meta device, where nothing is computed and nothing is stored.

The real ``TrainStep`` is called with 2 and with 3 micro-batches. Its work W(m) is affine in their number m, so it is

    per micro-batch W(3) - W(2),    once per step W(2) - 2 (W(3) - W(2)),

and the saving of a step that keeps its last micro-batch's graph is the difference of its work to that of a step that does not.

The bytes alive at once do not grow with m; they are (piecewise) affine in the samples of a micro-batch. Workspaces that kernels
allocate internally are not counted: up to a fifth more for convolutions of tiny maps, a twentieth on 28 x 28.
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
    """Cost of a rank's step per micro-batch and per step.

    Attributes:
        samples: Samples of a micro-batch.
        one_pass: True if the share of a rank is one micro-batch, whose graph is kept from the KKT sum to the cotangents.
        first: Cost per micro-batch of pass 1, the KKT sum without a graph; zero if there is one pass.
        second: Cost per micro-batch of pass 2: generator, KKT sum with graph, cotangents, backward.
        backward: Part of ``second`` in the generator's backward.
        saved: Saving per step by the micro-batch whose graph is kept until G is known.
        residual: Cost per step of the all-reduce's bucket, the residual and the direction.
        update: Cost per step of the generator's gradient bucket, its norm, and Adam.
        sums: Bytes of the all-reduces in the order of the step, without the generator's gradient.
        working_bytes: Most bytes alive at once, besides the classifier's weights and the generator's weights, gradient and moments.
        classifier_parameters: Number of classifier parameters P.
        generator_parameters: Number of generator parameters P_gen.
        operators: Number of calls of each operator in a step.
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
    """Classifier and generator of a run on the meta device, whose cost can be computed for any micro-batch.

    Products are counted in float32, everything else as configured.

    Args:
        bundle: Bundle of the classifier.
        config: Settings of the run; its batch sizes are ignored, except for the number of free images.
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
        """Return the cost of micro-batches of ``samples``, more than one of them unless ``one_pass``.

        Raises:
            UserError: ``samples`` is below 1.
        """
        if samples < 1:
            raise UserError(f"micro_batch={samples} is too small", "give at least one sample")
        if one_pass:
            return self._difference(samples, self._trace(samples, 1))
        two, three = (self._trace(samples, count, keeps_last=False) for count in (2, 3))
        return self._difference(samples, self._trace(samples, 2), two, three)

    def working_bytes(self, samples: int, one_pass: bool = False) -> int:
        """Return ``cost(...).working_bytes``, in less time."""
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
            run.optimizer.step()  # Adam allocates its moments in its first step
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
        """Return the difference of the cost of a dry run and of two others that keep no micro-batch's graph."""
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
    """Return the largest power of two, or ``limit`` itself, whose working bytes fit; 0 if one sample does not fit.

    Working bytes are convex in the samples b, as the maximum of phases f + s b. So a chord between a size that fits and one that does
    not lies above them: the size where it crosses ``available_bytes`` fits, and a few chords find the largest.

    Args:
        working_bytes: Working bytes of a micro-batch by its samples, such as ``DryRun(bundle, config).working_bytes``.
        available_bytes: Bytes available to everything that lives only within a step.
        limit: Upper limit of the result: a rank's share of the batch.
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
    """Return the largest power of two that is at most ``number``."""
    return 1 << (int(number).bit_length() - 1)


class CostTracer:
    """Engine without an effect, which runs the operators of the parts of a step that have no equivalent on the meta device."""

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
        """Reset all counts."""
        self.phases: list[OpCost] = []
        self.sums: list[int] = []
        self.backward_work = OpCost()
        self.meter.reset()

    def mark(self) -> None:
        """End a phase of the step."""
        done = sum(self.phases, OpCost())
        self.phases.append(self.meter.work - done)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Count an all-reduce."""
        self.sums.append(sum(t.numel() * t.element_size() for t in tensors))

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient, as ``Engine.gradient_norm``."""
        return get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def backward(self, surrogate: Tensor) -> None:
        """Run the backward of ``surrogate``, as ``Engine.backward``."""
        before = self.meter.work
        (surrogate * 1.0).backward()  # type: ignore[no-untyped-call]
        self.backward_work = self.meter.work - before

    def reduce(self) -> None:
        """Count the sum of the gradient in one flat bucket, as in DeepSpeed."""
        self.mark()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        bucket = torch.cat([g.reshape(-1) for g in gradients]).div_(1.0)
        for gradient, part in zip(gradients, torch.split(bucket, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def step(self, lr_factor: float) -> None:
        """Count Adam's update; the gradients stay, as they are no working memory."""
        self.optimizer.step()


class _MarkedSum(ResidualSum):
    """Residual's sum over ranks that ends the first phase without communication."""

    def __init__(self, run: CostTracer, objective: Objective, mesh: Mesh, comm_stream: CommStream) -> None:
        super().__init__(objective.theta, mesh, comm_stream, "float32", 2**62)
        self.run = run

    def total(self) -> dict[str, Tensor]:
        """Return the sum over micro-batches."""
        self.run.mark()
        self.run.sum([bucket.flat for bucket in self.buckets])
        return super().total()


class _Sum(RunningSum):
    """Sum of scalars without communication."""

    def __init__(self, run: CostTracer) -> None:
        super().__init__(World.single_process(META))
        self.run = run

    def total(self) -> dict[str, Tensor]:
        """Return the sum over micro-batches."""
        self.run.sum(self.sums.values())
        return super().total()


class _Latents:
    """Sampler of latents on the meta device."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def batch(self, step: int, start: int, stop: int) -> Latents:
        """Return latents of the shapes of ``LatentSampler.batch``."""
        index = torch.empty(stop - start, dtype=torch.int64, device=META)
        z = torch.empty(stop - start, self.dimensions, dtype=torch.float64, device=META)
        return Latents(z, index, index, index)


def generator_without_numbers(config: TrainConfig, bundles: Sequence[Bundle]) -> Generator | FreeImages:
    """Return the run's generator of these classifiers on the meta device."""
    lower, upper = boxes(bundles)
    latents, classes = LATENT_DIMENSIONS, class_counts(bundles)
    counts = batch_shares(config, classes) if len(bundles) > 1 else [config.global_batch]
    module = build_generator(config.generator, latents, classes, counts, lower, upper, config.seed)
    return module.to(META, DTYPES[config.dtype])
