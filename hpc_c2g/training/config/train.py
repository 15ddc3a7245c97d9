"""Typed settings of a training run; every default was chosen without the data of any classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc_c2g.errors import require
from hpc_c2g.generators.config import GENERATORS, GeneratorConfig, MLPGeneratorConfig
from hpc_c2g.monitoring.config import AlarmConfig, LogConfig
from hpc_c2g.monitoring.profiler import ProfilerConfig
from hpc_c2g.settings import from_plain
from hpc_c2g.training.config.objective import (
    AlphaConfig,
    DualityConfig,
    LossWeights,
    PriorConfig,
    StationarityConfig,
)

COMM_DTYPES = ("float32", "bfloat16")
PRECISIONS = ("float32", "bfloat16")
DTYPES = ("float32", "bfloat16")


@dataclass
class OptimizerConfig:
    """Settings of Adam and its learning rates, which follow a cosine schedule.

    Attributes:
        lr: Learning rate of the decoder.
        lr_codes: Learning rate of the codes.
        lr_multipliers: Learning rate of the multipliers.
        lr_canvases: Learning rate of the canvases. A higher one covers more if alpha stays on the high side, and pulls it down
            if it does not.
        max_grad_norm: Largest norm of the whole gradient; 0 for no clipping.
    """

    lr: float = 1e-3
    lr_codes: float = 0.02
    lr_multipliers: float = 0.01
    lr_canvases: float = 1e-3
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "lr_codes", "lr_multipliers", "lr_canvases"):
            # beyond it, float32 overflows within the optimizer
            require(
                0 < getattr(self, name) <= 1e30, f"optimizer.{name}", getattr(self, name), "give a rate in (0, 1e30]"
            )
        require(self.max_grad_norm >= 0, "optimizer.max_grad_norm", self.max_grad_norm, "give 0 for none")


@dataclass
class CheckpointConfig:
    """Checkpoints of a run.

    Attributes:
        every: Steps between two checkpoints.
        keep: Number of checkpoints kept.
    """

    every: int = 200
    keep: int = 2

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every", self.every, "give a number of steps >= 1")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "keep at least one")


@dataclass
class DistributedConfig:
    """Distribution of the work over processes; no setting changes the result beyond rounding, except ``comm_dtype: bfloat16``.

    Attributes:
        groups: Number of groups of processes, each with its own part of the classifiers and solutions; null takes as many as divide
            both.
        hierarchical: Sum G inside each node first, then across nodes.
        comm_dtype: Data type of G in collectives, ``float32`` or ``bfloat16`` (half the bytes, with error feedback).
    """

    groups: int | None = None
    hierarchical: bool = False
    comm_dtype: str = "float32"

    def __post_init__(self) -> None:
        require(self.groups is None or self.groups >= 1, "distributed.groups", self.groups, "give >= 1, or null")
        require(
            self.comm_dtype in COMM_DTYPES,
            "distributed.comm_dtype",
            self.comm_dtype,
            f"choose {' or '.join(COMM_DTYPES)}",
        )


@dataclass
class TrainConfig:
    """Settings of the training of a generator from one classifier bundle or several.

    Attributes:
        classifier: Folder of the bundle, or a list of folders.
        run_dir: Run directory, which holds all results; an existing one is resumed.
        steps: Number of optimizer steps.
        solutions: Independent solutions of each classifier's conditions that the generator holds, each with codes, multipliers, an alpha
            and an equal part of the batch of its own; the decoder is shared.
        global_batch: Number of samples B of a step over all classifiers, solutions and processes.
        micro_batch: Samples whose graph is held at once; null holds the whole batch (one pass), ``auto`` takes the most that fit.
        shares: Shares of the global batch per classifier, in any unit; empty for shares in proportion to the classes.
        seed: Seed of weights, latents and probes.
        dtype: Data type of the generator's weights; KKT sums are float32 at least.
        device: Device, ``auto``, ``cpu`` or ``cuda``.
        kkt_backend: Backend of G: ``auto`` takes the closed form of G and its cotangents if the classifier is a flatten(1), nn.Linear and
            (leaky) ReLU (hpc_c2g/kkt/closed_form.py), ``autograd`` always goes through autograd. The result is the same to rounding.
        matmul_precision: Precision of the matrix products in KKT sums: ``float32``, or ``bfloat16``, which rounds inputs and sums in
            float32 (on the closed form only).
        deterministic: Same bits on every number of ranks that divides ``deterministic_shards``, which then is the number of micro-batches;
            they are summed in a fixed tree, and plain Adam replaces DeepSpeed. Slow, for debugging and proofs; ``micro_batch``,
            ``deepspeed`` and the rest of ``distributed`` are ignored.
        deterministic_shards: Number of micro-batches, a power of two, at most ``global_batch``.
        zero_stage: State that DeepSpeed shards over the ranks: 0 nothing, 1 Adam's state, 2 gradients too, 3 weights too. The result
            is the same to rounding.
        deepspeed: Settings that override those that the engine makes for DeepSpeed.
    """

    classifier: Any = "???"
    run_dir: str = "???"
    steps: int = 3000
    solutions: int = 1
    global_batch: int = 200
    micro_batch: int | str | None = None
    shares: list[float] = field(default_factory=list)
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    kkt_backend: str = "auto"
    matmul_precision: str = "float32"
    deterministic: bool = False
    deterministic_shards: int = 8
    generator: GeneratorConfig = field(default_factory=MLPGeneratorConfig)
    stationarity: StationarityConfig = field(default_factory=StationarityConfig)
    duality: LossWeights = field(default_factory=DualityConfig)
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    prior: LossWeights = field(default_factory=PriorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    zero_stage: int = 0
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "give at least one step")
        require(
            self.solutions >= 1, "solutions", self.solutions, "give 1, or more for more coverage in as much more time"
        )
        require(self.global_batch >= 1, "global_batch", self.global_batch, "give at least one sample")
        require(
            not self.profiler.steps or self.profiler.steps[1] <= self.steps,
            "profiler.steps",
            self.profiler.steps,
            f"give steps from 1 to steps={self.steps}",
        )
        size = self.micro_batch
        require(
            size in (None, "auto") or (isinstance(size, int) and 1 <= size <= self.global_batch),
            "micro_batch",
            size,
            f"give a number from 1 to global_batch={self.global_batch}, auto, or null for the whole batch",
        )
        folders = self.classifiers
        require(
            bool(folders) and all(isinstance(f, str) and f for f in folders),
            "classifier",
            self.classifier,
            "give the folder of a bundle, or a list of them such as 'classifier=[a,b]'",
        )
        require(len(set(folders)) == len(folders), "classifier", self.classifier, "name each bundle once")
        require(all(s > 0 for s in self.shares), "shares", self.shares, "give positive shares")
        require(0 <= self.seed < 2**63, "seed", self.seed, "give a seed from 0 to 2^63 - 1")
        shards = self.deterministic_shards
        require(shards >= 1 and shards & (shards - 1) == 0, "deterministic_shards", shards, "give a power of two")
        require(
            not self.deterministic or shards <= self.global_batch,
            "deterministic_shards",
            shards,
            f"deterministic=true needs at most global_batch={self.global_batch} shards",
        )
        require(self.dtype in DTYPES, "dtype", self.dtype, f"choose {' or '.join(DTYPES)}")
        require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "choose auto, cpu or cuda")
        require(self.kkt_backend in ("auto", "autograd"), "kkt_backend", self.kkt_backend, "choose auto or autograd")
        require(
            self.matmul_precision in PRECISIONS,
            "matmul_precision",
            self.matmul_precision,
            f"choose {' or '.join(PRECISIONS)}",
        )
        require(self.zero_stage in (0, 1, 2, 3), "zero_stage", self.zero_stage, "choose 0, 1, 2 or 3")
        require(
            not (self.deterministic and self.zero_stage),
            "zero_stage",
            self.zero_stage,
            "deterministic=true runs without DeepSpeed: give zero_stage=0, or deterministic=false",
        )
        zero = self.deepspeed.get("zero_optimization")
        stage = zero.get("stage", self.zero_stage) if isinstance(zero, Mapping) else self.zero_stage
        require(
            stage == self.zero_stage,
            "deepspeed.zero_optimization.stage",
            stage,
            f"it contradicts zero_stage={self.zero_stage}: give the stage by zero_stage alone",
        )

    @property
    def classifiers(self) -> list[str]:
        """Return the folders of the bundles."""
        return list(self.classifier) if isinstance(self.classifier, (list, tuple)) else [self.classifier]

    @property
    def members(self) -> list[str]:
        """Return the folder of each member (one solution of one classifier), classifier by classifier."""
        return [folder for folder in self.classifiers for _ in range(self.solutions)]

    @property
    def prefixes(self) -> list[str]:
        """Return the prefix of the names of each member's curves; empty if there is only one."""
        several, more = len(self.classifiers) > 1, self.solutions > 1
        return [
            (f"classifier{k}/" if several else "") + (f"solution{s}/" if more else "")
            for k in range(len(self.classifiers))
            for s in range(self.solutions)
        ]


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """Return the typed configuration of plain values, such as a run's ``config.yaml``.

    Raises:
        UserError: A key is unknown, or a value has the wrong type or is out of range.
    """
    return from_plain(TrainConfig, values, {"generator": GENERATORS})
