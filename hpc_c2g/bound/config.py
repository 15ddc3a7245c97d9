"""Typed settings of the measurement of the sampling error."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc_c2g.errors import UserError, require
from hpc_c2g.generators.config import SCHEMES

INDEPENDENT = "independent"
DRAWS = (INDEPENDENT, *reversed(SCHEMES))
"""Ways to draw a batch: independent labels and latents, or cycling labels with one of ``SCHEMES``."""
CONFIDENCE = 0.95
"""Confidence of the bound, and quantile of the measured errors that it is compared with."""


@dataclass
class BoundConfig:
    """Measurement of the sampling error of a run.

    Attributes:
        run_dir: Run directory of the generator; sampling_error.json is written into it.
        batches: Batch sizes B of one classifier's KKT sum; the run's own B is measured too.
        repeats: Number of batches per size.
        reference_batch: Number of samples for the expectation (in lattices), and of independent ones for covariance and bound.
        seed: Seed of all draws.
        schemes: ``independent`` labels and latents, or cycling labels with ``normal``, ``sobol`` or ``stratified`` latents.
        micro_batch: Samples per backward; the result does not depend on it.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    run_dir: str = "???"
    batches: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024, 2048, 4096])
    repeats: int = 64
    reference_batch: int = 65536
    seed: int = 0
    schemes: list[str] = field(default_factory=lambda: list(DRAWS))
    micro_batch: int = 1024
    device: str = "auto"

    def __post_init__(self) -> None:
        batches = bool(self.batches) and min(self.batches) >= 1
        require(batches, "batches", self.batches, "give one or more batch sizes >= 1")
        if self.repeats < 2:
            raise UserError(f"repeats={self.repeats} is too small", "give at least 2, better 64")
        if self.reference_batch < max(self.batches):
            raise UserError(
                f"reference_batch={self.reference_batch} is smaller than the largest of batches={self.batches}",
                "give a reference_batch several times as large as every batch",
            )
        require(0 <= self.seed < 2**63, "seed", self.seed, "give a seed from 0 to 2^63 - 1")
        known = bool(self.schemes) and all(scheme in DRAWS for scheme in self.schemes)
        require(known, "schemes", self.schemes, f"choose from {', '.join(DRAWS)}")
        if self.micro_batch < 1:
            raise UserError(f"micro_batch={self.micro_batch} is too small", "give at least 1")
        require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "choose auto, cpu or cuda")
