"""A plan for one training run on one cluster: what fits, how long a step takes, how it scales."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hpc_c2g.classifiers.bundle import Bundle, load_bundle
from hpc_c2g.errors import UserError, require
from hpc_c2g.planning.hardware import Hardware, HardwareSpec, LocalHardware, load_hardware
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
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.cost.dry_run import DryRun, MicroBatchCost, largest_micro_batch
from hpc_c2g.units import GIB


@dataclass
class PlanConfig(TrainConfig):
    """A training run as ``c2g train`` takes it, and where it would run.

    The plan takes G's sum as float32, inside nodes first where that is faster, and as not hidden: ``distributed`` has no say in it.

    Attributes:
        run_dir: not used.
        micro_batch: as for ``c2g train``; ``auto`` takes the largest that fits, split evenly.
        hardware: which; ``here`` is measured.
        hardware_file: file of saved numbers, instead of ``hardware``.
        save_hardware: where to write the numbers that was used.
        nodes: N.
        zero_stage: of DeepSpeed; None takes the lowest that fits.
        overlap: DeepSpeed's overlap_comm, from stage 1 on.
        margin: share of the memory that stays free.
        max_nodes: the scaling tables go to this, in powers of two.
        out: json file of the whole plan.
    """

    run_dir: str = ""
    micro_batch: int | str | None = "auto"
    hardware: Hardware = field(default_factory=LocalHardware)
    hardware_file: str | None = None
    save_hardware: str | None = None
    nodes: int = 1
    zero_stage: int | None = None  # type: ignore[assignment]
    overlap: bool = False
    margin: float = 0.1
    max_nodes: int = 1024
    out: str | None = None

    def __post_init__(self) -> None:
        wanted, self.zero_stage = self.zero_stage, self.zero_stage or 0
        super().__post_init__()
        self.zero_stage = wanted
        if len(self.classifiers) > 1:
            raise UserError(
                f"classifier={self.classifier} names {len(self.classifiers)}", "plan one classifier at a time"
            )
        if self.solutions > 1:
            raise UserError(
                f"solutions={self.solutions} is not planned for",
                "plan one, with its part of global_batch; n take n times as long",
            )
        require(self.nodes >= 1, "nodes", self.nodes, "give at least one node")
        require(self.max_nodes >= 1, "max_nodes", self.max_nodes, "give at least one node")
        if not 0 <= self.margin < 1:
            raise UserError(f"margin={self.margin} is no share", "give a share in [0, 1)")


@dataclass(frozen=True)
class Plan:
    """What ``make_plan`` found; bytes and seconds of one rank.

    Attributes:
        hardware: of the cluster.
        nodes: N.
        share: samples of a rank.
        micro_batch: samples whose graph is held.
        zero_stage: of DeepSpeed.
        dtype: of the generator.
        overlap: whether the generator's sum is hidden.
        cost: of a micro-batch.
        memory: of a rank.
        available: bytes of a rank, without the margin.
        step: its seconds.
        strong: the same batch on more nodes.
        weak: a batch that grows with the nodes.
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
    """Cost the step, measure the hardware, choose micro-batch and ZeRO stage, predict.

    Raises:
        UserError: no bundle, a batch that the ranks cannot share, a hardware that cannot be had, or nothing that fits.
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
    """The saved one, the named one, or that of this machine."""
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
    """(ZeRO stage, largest micro-batch): the lowest stage at which one sample fits, then as many samples as fit.

    Raises:
        UserError: nothing fits; with the bytes that are needed at least.
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
    """Of the bundle's tensors, twice: the model of the bundle, and the copy whose graph is traced."""
    return float(sum(t.numel() * t.element_size() for t in bundle.model.state_dict().values()))
