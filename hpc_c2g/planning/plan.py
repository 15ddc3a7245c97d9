"""Plan of one training run on one cluster: memory, time per step and scaling."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpc_c2g.classifiers.bundle import Bundle, load_bundle
from hpc_c2g.errors import UserError
from hpc_c2g.planning.config import PlanConfig
from hpc_c2g.planning.hardware import HardwareSpec, LocalHardware, load_hardware
from hpc_c2g.planning.measure import measure
from hpc_c2g.planning.predict import (
    STAGES,
    Memory,
    ScalingRow,
    StepTime,
    balanced,
    classifier_bytes,
    generator_bytes,
    memory,
    scaling,
    step_time,
)
from hpc_c2g.training.cost.dry_run import DryRun, MicroBatchCost, largest_micro_batch
from hpc_c2g.units import GIB


@dataclass(frozen=True)
class Plan:
    """Result of ``make_plan``; bytes and seconds are of one rank.

    Attributes:
        hardware: Hardware of the cluster.
        nodes: N, the number of nodes.
        share: Samples per rank.
        micro_batch: Samples per micro-batch.
        zero_stage: ZeRO stage of DeepSpeed.
        dtype: Dtype of the generator.
        overlap: True if the generator's gradient communication overlaps with its backward.
        cost: Cost of a micro-batch.
        memory: Memory of a rank.
        available: Bytes available to a rank, without the margin.
        step: Seconds of a step.
        strong: Scaling table with a constant global batch.
        weak: Scaling table with a global batch proportional to the nodes.
    """

    hardware: HardwareSpec
    nodes: int
    share: int
    micro_batch: int
    zero_stage: int
    dtype: str
    overlap: bool
    cost: MicroBatchCost
    memory: Memory
    available: float
    step: StepTime
    strong: list[ScalingRow]
    weak: list[ScalingRow]

    def record(self) -> dict[str, Any]:
        """Plain values for a json file, without the list of operators."""
        values = asdict(self)
        del values["cost"]["operators"]
        values["memory"]["total"], values["step"]["total"] = self.memory.total, self.step.total
        for name in ("strong", "weak"):
            for row, plain in zip(getattr(self, name), values[name], strict=True):
                plain["step"]["total"] = row.step.total
        return values


def make_plan(config: PlanConfig) -> Plan:
    """Compute the step's cost, measure the hardware, choose micro-batch and ZeRO stage, and predict.

    Raises:
        UserError: no bundle, fewer samples than ranks, unreadable or unmeasurable hardware, or nothing fits.
    """
    bundle = load_bundle(config.classifier)
    dry = DryRun(bundle, config)
    hardware = find_hardware(config, dry)
    ranks = config.nodes * hardware.ranks_per_node
    if config.global_batch < ranks:
        raise UserError(
            f"global_batch={config.global_batch} is too small for {ranks} ranks (nodes={config.nodes})",
            "give a sample per rank at least",
        )
    share = -(-config.global_batch // ranks)
    stage, largest = choose(config, hardware, dry, share, ranks, _file_bytes(bundle))
    if stage != config.zero_stage:  # a step at stage 3 keeps no micro-batch
        dry = DryRun(bundle, replace(config, zero_stage=stage))
    cost_of = functools.cache(dry.cost)
    micro = balanced(share, largest)
    cost = cost_of(micro, micro == share)
    counts = [2**i for i in range(config.max_nodes.bit_length())]
    per_node = config.global_batch // config.nodes
    table = functools.partial(
        scaling, cost_of, hardware, counts, largest=largest, dtype=config.dtype, stage=stage, overlap=config.overlap
    )
    return Plan(
        hardware,
        config.nodes,
        share,
        micro,
        stage,
        config.dtype,
        config.overlap,
        cost,
        memory(cost, hardware, config.dtype, stage, ranks, _file_bytes(bundle)),
        hardware.rank_memory * (1 - config.margin),
        step_time(cost, hardware, config.nodes, share, config.dtype, stage, config.overlap),
        table(batch_of=lambda n: config.global_batch, strong=True),
        table(batch_of=lambda n: n * per_node, strong=False),
    )


def find_hardware(config: PlanConfig, dry: DryRun) -> HardwareSpec:
    """Return the hardware of ``hardware_file``, the named hardware, or that of this machine."""
    if config.hardware_file is not None:
        return load_hardware(Path(config.hardware_file))
    if isinstance(config.hardware, HardwareSpec):
        return config.hardware
    assert isinstance(config.hardware, LocalHardware)
    sample = min(config.micro_batch if isinstance(config.micro_batch, int) else 256, config.global_batch)
    return measure(config.hardware, dry.cost(sample))


def choose(
    config: PlanConfig, hardware: HardwareSpec, dry: DryRun, share: int, ranks: int, file_bytes: float
) -> tuple[int, int]:
    """Choose (ZeRO stage, largest micro-batch): the lowest stage at which one sample fits, then as many samples as fit.

    Raises:
        UserError: nothing fits; the message names the required memory.
    """
    room = hardware.rank_memory * (1 - config.margin) - hardware.runtime_gib * GIB
    small = dry.cost(1)
    room -= classifier_bytes(small.classifier_parameters, hardware, file_bytes)
    limit = min(share, config.micro_batch) if isinstance(config.micro_batch, int) else share
    least = float("inf")
    for stage in STAGES if config.zero_stage is None else (config.zero_stage,):
        state = sum(generator_bytes(small.generator_parameters, config.dtype, stage, ranks))
        if config.micro_batch != "auto":
            needed = dry.working_bytes(limit, limit == share)
            largest = limit if needed <= room - state else 0
        else:
            needed = small.working_bytes
            largest = largest_micro_batch(lambda b: dry.working_bytes(b, b == share), room - state, limit)
        if largest:
            return stage, largest
        least = min(least, state + needed)
    have, short = hardware.rank_memory * (1 - config.margin) / GIB, (least - room) / GIB
    raise UserError(
        f"micro_batch={1 if config.micro_batch == 'auto' else limit} needs {have + short:.2f} GiB per rank, {have:.2f} GiB are there"
        f" (hardware {hardware.name}: {hardware.rank_memory / GIB:.2f} GiB, margin={config.margin})",
        "lower micro_batch, take more nodes for zero_stage=3, a smaller generator, or ranks with more memory",
    )


def _file_bytes(bundle: Bundle) -> float:
    """Bytes of the bundle's tensors."""
    return float(sum(t.numel() * t.element_size() for t in bundle.model.state_dict().values()))
