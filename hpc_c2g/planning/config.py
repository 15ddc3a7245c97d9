"""Typed settings of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc_c2g.errors import UserError, require
from hpc_c2g.planning.hardware import Hardware, LocalHardware
from hpc_c2g.training.config.train import TrainConfig


@dataclass
class PlanConfig(TrainConfig):
    """Settings of a training run as in ``c2g train``, and of the cluster.

    The plan ignores ``distributed``: it assumes a float32 sum of G, hierarchical if that is faster, without overlap.

    Attributes:
        run_dir: Not used.
        micro_batch: Samples per micro-batch as in ``c2g train``; ``auto`` takes the largest that fits, split evenly.
        hardware: Name of the hardware; ``here`` is measured.
        hardware_file: File of saved hardware numbers, instead of ``hardware``.
        save_hardware: File to write the used hardware numbers to.
        nodes: Number of nodes.
        zero_stage: ZeRO stage of DeepSpeed; None takes the lowest that fits.
        overlap: DeepSpeed's overlap_comm, from stage 1 on.
        margin: Fraction of the memory that stays free.
        max_nodes: Largest number of nodes of the scaling tables, in powers of two.
        out: JSON file of the whole plan.
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
