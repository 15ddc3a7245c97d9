"""Memory and time of a training step on a cluster (pure functions of a dry run's cost and the hardware's numbers).

Symbols: P classifier parameters, Q generator parameters, n ranks, m micro-batches per rank and step; bytes and seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from hpc_c2g.planning.collectives import all_reduce_seconds, generator_seconds
from hpc_c2g.planning.hardware import HardwareSpec
from hpc_c2g.training.cost.dry_run import MicroBatchCost
from hpc_c2g.training.cost.op_counter import OpCost
from hpc_c2g.units import GIB

STAGES = (0, 1, 2, 3)
CostOf = Callable[[int, bool], MicroBatchCost]
"""(samples of a micro-batch, one pass) -> cost of the micro-batch, such as ``DryRun.cost``."""


@dataclass(frozen=True)
class Memory:
    """Memory of one rank in bytes.

    Attributes:
        runtime: Memory of the process before its first tensor.
        classifier: theta, and its copy in the traced graph.
        weights: Weights of the generator.
        gradients: Gradients of the generator.
        moments: Adam's two moments, and the float32 master weights if DeepSpeed keeps them.
        working: Peak within a step: G, residual, direction, buckets, and one micro-batch with its graph.
    """

    runtime: float
    classifier: float
    weights: float
    gradients: float
    moments: float
    working: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(getattr(self, f.name) for f in fields(self)))


def generator_bytes(parameters: int, dtype: str, stage: int, ranks: int) -> tuple[float, float, float]:
    """Weights, gradients, and moments with master, of a rank: w Q, w Q, (8 + M) Q bytes, each divided by n where ZeRO shards it.

    w = 4 (float32) or 2 (bfloat16). M = 4 for the float32 master, 0 where stage 0 trains float32 weights themselves. Stage 1
    shards the moments, 2 the gradients too, 3 the weights too.
    """
    w = {"float32": 4, "bfloat16": 2}[dtype]
    master = 0 if stage == 0 and dtype == "float32" else 4
    weights = w * parameters / (ranks if stage >= 3 else 1)
    gradients = w * parameters / (ranks if stage >= 2 else 1)
    return weights, gradients, (8 + master) * parameters / (ranks if stage >= 1 else 1)


def classifier_bytes(parameters: int, hardware: HardwareSpec, file_bytes: float) -> float:
    """8 P: theta and the weights in the traced graph, both float32; ranks on the CPU also hold the file's tensors and a copy."""
    return 8 * parameters + (file_bytes if hardware.cores else 0)


def memory(
    cost: MicroBatchCost, hardware: HardwareSpec, dtype: str, stage: int, ranks: int, file_bytes: float = 0.0
) -> Memory:
    """Predict the memory of one of ``ranks`` ranks; ``file_bytes`` are the bundle's tensors."""
    return Memory(
        hardware.runtime_gib * GIB,
        classifier_bytes(cost.classifier_parameters, hardware, file_bytes),
        *generator_bytes(cost.generator_parameters, dtype, stage, ranks),
        cost.working_bytes,
    )


def work_seconds(work: OpCost, hardware: HardwareSpec) -> float:
    """Roofline of a rank: device max(F / R, b_F / W) + b / W, host c o; the larger of both if asynchronous, else their sum.

    F operations and b_F bytes of matrix products, b bytes of the other operators, c calls; R, W, o the hardware's matrix rate, memory
    bandwidth and time per call. Ranks that share cores get a share of each rate.
    """
    bandwidth = hardware.memory_gb_per_s * 1e9
    device = max(work.flops / (hardware.matrix_tflops * 1e12), work.matrix_bytes / bandwidth)
    device += work.moved_bytes / bandwidth
    host = work.calls * hardware.operation_us * 1e-6
    return (max(device, host) if hardware.asynchronous else device + host) / hardware.share


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; ``hidden`` communication overlaps with computation.

    Attributes:
        first: Pass 1, the KKT sum (0 with a single pass).
        second: Pass 2, cotangents and the generator's backward.
        saved: Time saved by keeping a micro-batch's graph from pass 1 to pass 2.
        residual: Residual, direction and their buffers.
        update: Adam and the generator's buffers.
        residual_sum: All-reduce of G and of the step's scalars.
        generator_sum: Communication of the generator's gradient (and, in stage 3, weights).
        hidden: Part of ``generator_sum`` that overlaps with the last backward.
    """

    first: float
    second: float
    saved: float
    residual: float
    update: float
    residual_sum: float
    generator_sum: float
    hidden: float = 0.0

    @property
    def computation(self) -> float:
        """Seconds of computation."""
        return self.first + self.second - self.saved + self.residual + self.update

    @property
    def exposed(self) -> float:
        """Seconds of communication that does not overlap with computation."""
        return self.residual_sum + self.generator_sum - self.hidden

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.computation + self.exposed


def step_time(
    cost: MicroBatchCost,
    hardware: HardwareSpec,
    nodes: int,
    share: int,
    dtype: str = "float32",
    stage: int = 0,
    overlap: bool = False,
) -> StepTime:
    """t = m (t_first + t_second) - t_saved + t_residual + t_update + t_sums, with m = share / micro-batch.

    The sums of a step: each all-reduce of the dry run, one stop flag, and the generator's gradient. ZeRO updates 1/n of the weights
    on each rank. ``overlap`` hides the generator's sum behind the backward of the last micro-batch, as
    DeepSpeed's overlap_comm does from stage 1 on.

    Args:
        cost: Cost of a micro-batch.
        hardware: Hardware of the cluster.
        nodes: N, the number of nodes.
        share: Samples per rank.
        dtype: Dtype of the generator's weights.
        stage: ZeRO stage.
        overlap: Overlap the generator's gradient communication with its backward.
    """
    m = share / cost.samples
    ranks = nodes * hardware.ranks_per_node
    single_rank = ranks == 1
    nbytes = {"float32": 4, "bfloat16": 2}[dtype] * cost.generator_parameters
    sums = 0.0 if single_rank else sum(all_reduce_seconds(b, nodes, hardware) for b in (*cost.sums, 4))
    forwards = math.ceil(m) * (1 if cost.one_pass else 2)
    generator = 0.0 if single_rank else generator_seconds(nbytes, stage, math.ceil(m), forwards, nodes, hardware)
    return StepTime(
        first=work_seconds(cost.first, hardware) * m,
        second=work_seconds(cost.second, hardware) * m,
        saved=work_seconds(cost.saved, hardware),
        residual=work_seconds(cost.residual, hardware),
        update=work_seconds(cost.update, hardware) / (ranks if stage else 1),
        residual_sum=sums,
        generator_sum=generator,
        hidden=min(generator, work_seconds(cost.backward, hardware)) if overlap and stage else 0.0,
    )


@dataclass(frozen=True)
class ScalingRow:
    """One row of a scaling table: batch, step time and efficiency on a number of nodes.

    Attributes:
        nodes: N, the number of nodes.
        ranks: n, the number of ranks.
        global_batch: B, the global batch size.
        micro_batch: Samples per micro-batch.
        step: Seconds of a step.
        efficiency: Strong: t(1) / (N t(N)); weak: t(1) / t(N); 1 at one node.
        error: Statistical error of the batch's G relative to the smallest batch in the table, sqrt(B_0 / B).
    """

    nodes: int
    ranks: int
    global_batch: int
    micro_batch: int
    step: StepTime
    efficiency: float
    error: float


def balanced(share: int, largest: int) -> int:
    """Samples per micro-batch when ``share`` is split evenly into micro-batches of at most ``largest``."""
    return math.ceil(share / math.ceil(share / largest))


def scaling(
    cost_of: CostOf,
    hardware: HardwareSpec,
    nodes: Sequence[int],
    batch_of: Callable[[int], int],
    largest: int,
    strong: bool,
    dtype: str = "float32",
    stage: int = 0,
    overlap: bool = False,
) -> list[ScalingRow]:
    """Predict step times over numbers of nodes, from 1 until the ranks no longer divide the batch.

    Args:
        cost_of: Cost of a micro-batch.
        hardware: Hardware of the cluster.
        nodes: Increasing numbers of nodes, from 1.
        batch_of: Global batch size by number of nodes.
        largest: Largest micro-batch that fits into memory.
        strong: Constant global batch (strong scaling) instead of a growing one (weak scaling).
        dtype: Dtype of the generator.
        stage: ZeRO stage.
        overlap: See ``step_time``.
    """
    rows: list[ScalingRow] = []
    for n in nodes:
        batch, ranks = batch_of(n), n * hardware.ranks_per_node
        if batch % ranks:
            break
        share = batch // ranks
        micro = balanced(share, largest)
        time = step_time(cost_of(micro, micro == share), hardware, n, share, dtype, stage, overlap)
        first, smallest = (rows[0].step.total, rows[0].global_batch) if rows else (time.total, batch)
        efficiency = first / time.total / (n if strong else 1)
        rows.append(ScalingRow(n, ranks, batch, micro, time, efficiency, math.sqrt(smallest / batch)))
    return rows
