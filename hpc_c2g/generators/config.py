"""Typed settings of the generators, of their latents and of how samples are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc_c2g.errors import UserError

SCHEMES = ("stratified", "sobol", "normal")

LATENT_DIMENSIONS = 4
"""Dimension of a generator's latents."""
DRAWINGS = ("multipliers", "supported", "plain")
"""Ways to draw samples: in proportion to their multipliers; uniformly among supported samples; uniformly among all."""


@dataclass
class GeneratorConfig:
    """Common settings of all generators.

    Attributes:
        name: Kind of generator.
        codes: Number of learned codes per class; the first latent coordinate selects one of them (the quantile of z_0 in equal parts), the
            others vary around it. 0: no codes, the class alone is embedded.
        canvas: Add a learned image per code (without codes: per class) to the decoder's image.
    """

    name: str = "mlp"
    codes: int = 20
    canvas: bool = False

    def __post_init__(self) -> None:
        if self.codes < 0:
            raise UserError(f"generator.codes={self.codes} is negative", "give codes per class, or 0 for none")


@dataclass
class MLPGeneratorConfig(GeneratorConfig):
    """Fully connected generator.

    Attributes:
        widths: Widths of the hidden layers.
    """

    name: str = "mlp"
    widths: list[int] = field(default_factory=lambda: [256])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"generator.widths={self.widths}", "give one or more widths >= 1")


@dataclass
class ConvGeneratorConfig(GeneratorConfig):
    """Upsampling convolutional generator with GroupNorm.

    Attributes:
        channels: Channels at full resolution, doubled at each coarser one.
        coarsest: Largest side of the coarsest resolution.
    """

    name: str = "conv"
    channels: int = 32
    coarsest: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 8 or self.channels % 8:
            raise UserError(f"generator.channels={self.channels}", "give a multiple of 8")
        if self.coarsest < 1:
            raise UserError(f"generator.coarsest={self.coarsest}", "give at least 1")


@dataclass
class FreeImagesConfig(GeneratorConfig):
    """No generator: a free image and multipliers per sample of the batch, as in earlier reconstruction methods.

    Attributes:
        start: Standard deviation of the initial images.
    """

    name: str = "free"
    start: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start > 0:
            raise UserError(f"generator.start={self.start}", "give a positive standard deviation")


GENERATORS: dict[str, type[GeneratorConfig]] = {
    "mlp": MLPGeneratorConfig,
    "conv": ConvGeneratorConfig,
    "free": FreeImagesConfig,
}


def check_drawing(drawing: str) -> None:
    """Refuse an unknown way to draw.

    Raises:
        UserError: ``drawing`` is none of ``DRAWINGS``.
    """
    if drawing not in DRAWINGS:
        raise UserError(f"drawing={drawing!r} is unknown", f"choose one of {', '.join(DRAWINGS)}")
