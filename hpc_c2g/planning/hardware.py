"""Hardware of a cluster: the dozen numbers that a prediction needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hpc_c2g.errors import UserError, require
from hpc_c2g.units import GIB


@dataclass
class Hardware:
    """Common settings of all choices of ``hardware=``.

    Attributes:
        name: Name of the choice.
    """

    name: str = "here"


@dataclass
class LocalHardware(Hardware):
    """This machine, measured.

    Attributes:
        name: Name of the choice.
        ranks_per_node: Number of processes that compute at once; 0 takes one per GPU, or one per core without a GPU.
        seconds: Approximate duration of each measurement.
    """

    name: str = "here"
    ranks_per_node: int = 0
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.ranks_per_node < 0:
            raise UserError(f"hardware.ranks_per_node={self.ranks_per_node} is negative", "give ranks, or 0 for all")
        require(self.seconds > 0, "hardware.seconds", self.seconds, "give seconds > 0")


@dataclass
class HardwareSpec(Hardware):
    """Rates of one rank (a GPU, or a process on its share of the cores) and of the links between ranks.

    Attributes:
        name: Name of the cluster.
        ranks_per_node: GPUs per node.
        memory_gib: Memory of one GPU; if ranks share cores, of the node.
        runtime_gib: Memory of one process before its first tensor (CUDA context, libraries).
        matrix_tflops: 10^12 operations per second of matrix products, in the dtype of the KKT sums (float32).
        memory_gb_per_s: 10^9 bytes per second of memory-bound operators, read and written.
        operation_us: Microseconds of the host per operator call.
        asynchronous: The host runs ahead of the device, so that the slower of the two limits the speed.
        intra_gb_per_s: Bus bandwidth of an all-reduce within a node, 10^9 bytes per second and rank.
        intra_us: Latency of one message within a node.
        inter_gb_per_s: 10^9 bytes per second out of one *node*.
        inter_us: Latency of one message between nodes.
        cores: Number of cores that the node's ranks share; 0 if every rank has its own device.
    """

    name: str = "custom"
    ranks_per_node: int = 8
    memory_gib: float = 80.0
    runtime_gib: float = 2.0
    matrix_tflops: float = 10.0
    memory_gb_per_s: float = 1000.0
    operation_us: float = 8.0
    asynchronous: bool = True
    intra_gb_per_s: float = 200.0
    intra_us: float = 3.0
    inter_gb_per_s: float = 100.0
    inter_us: float = 6.0
    cores: int = 0

    def __post_init__(self) -> None:
        positive = [
            "ranks_per_node",
            "memory_gib",
            "matrix_tflops",
            "memory_gb_per_s",
            "intra_gb_per_s",
            "inter_gb_per_s",
        ]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("name", "asynchronous"):
                continue
            fits = math.isfinite(value) and value >= 0 and (value > 0 or item.name not in positive)
            bound = "a number > 0" if item.name in positive else "a number >= 0"
            require(fits, f"hardware.{item.name}", value, f"give {bound}")

    @property
    def share(self) -> float:
        """Fraction of a core per rank: 1, or cores / ranks if there are more ranks than cores."""
        return min(1.0, self.cores / self.ranks_per_node) if self.cores else 1.0

    @property
    def rank_memory(self) -> float:
        """Bytes for one rank."""
        return self.memory_gib * GIB / (self.ranks_per_node if self.cores else 1)


def load_hardware(path: Path) -> HardwareSpec:
    """Read a hardware file that ``save_hardware=FILE`` wrote, or a copy of ``configs/hardware/h100.yaml`` with other numbers.

    Raises:
        UserError: the file cannot be read, or has an unknown field or an impossible value.
    """
    try:
        values = OmegaConf.load(path)
        assert isinstance(values, DictConfig), "it holds no fields"
        values.pop("defaults", None)
        hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HardwareSpec), values))
    except UserError:
        raise
    except Exception as error:  # file system, YAML and OmegaConf errors
        reason = str(error).splitlines()[0]
        raise UserError(
            f"hardware_file={path} cannot be read: {reason}", "write one with save_hardware=FILE"
        ) from error
    assert isinstance(hardware, HardwareSpec)
    return hardware


def as_yaml(hardware: HardwareSpec) -> str:
    """Format the hardware as YAML for ``load_hardware``, numbers to four digits."""
    values = {f.name: getattr(hardware, f.name) for f in fields(hardware)}
    return OmegaConf.to_yaml({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()})
