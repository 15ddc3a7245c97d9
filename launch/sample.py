"""``c2g sample``: images from a trained generator, as a PNG grid or an .npz."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from hpc_c2g.errors import UserError, require
from hpc_c2g.files import write_atomically
from hpc_c2g.generators.config import check_drawing
from launch._compose.cli import run_verb


@dataclass
class SampleConfig:
    """Samples to draw.

    Attributes:
        run_dir: Run directory of the generator.
        count: Number of samples, cycling through the classes.
        out: File to write: a .png (grid) or .npz (samples, labels, classes).
        seed: Seed of the samples.
        drawing: Distribution of the samples: ``multipliers`` in proportion to their multipliers, ``supported`` evenly among those that
            carry some, ``plain`` evenly among all.
    """

    run_dir: str = "???"
    count: int = 100
    out: str = "???"
    seed: int = 0
    drawing: str = "multipliers"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count={self.count} is too small", "draw at least one sample")
        require(0 <= self.seed < 2**63, "seed", self.seed, "give a seed from 0 to 2^63 - 1")
        check_drawing(self.drawing)
        if Path(self.out).suffix not in (".png", ".npz") and self.out != "???":
            raise UserError(f"out={self.out} has an unknown extension", "end it with .png or .npz")


def sample(config: SampleConfig) -> None:
    """Draw the samples and write the file."""
    import numpy as np  # torch takes seconds to import: after the settings are checked

    from hpc_c2g.monitoring.images import drawable, grid, save_png, zoom_for
    from hpc_c2g.training.results import load_run

    generator = load_run(config.run_dir).generator
    samples, labels = generator.sample(config.count, config.seed, config.drawing)
    out = Path(config.out)
    if out.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, samples=samples.numpy(), labels=labels.numpy(), classes=np.array(generator.classes))
        write_atomically(out, buffer.getvalue())
    elif drawable(generator.input_shape):
        save_png(grid(samples, len(generator.classes)), out, zoom_for(samples.shape[-1]))
    else:
        raise UserError(
            f"out={out}: samples of shape {list(generator.input_shape)} are not images", "write an .npz instead"
        )
    print(f"written: {out} ({config.count} samples of {len(generator.classes)} classes)")


def main() -> None:
    """Run the verb."""
    run_verb("sample", SampleConfig, sample)


if __name__ == "__main__":
    main()
