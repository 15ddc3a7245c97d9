"""Typed settings of the generators."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc_c2g.errors import UserError


@dataclass
class GeneratorConfig:
    """What all generators share.

    Attributes:
        name: of the kind.
        codes: learned codes per class; the first latent coordinate selects one of them (the quantile of z_0 in equal parts), the
            others vary around it. 0: no codes, the class alone is embedded.
        gain: on the continuous latents.
        canvas: each code (without codes: each class) has a learned image of its own too, which the decoder's is added to.
    """

    name: str = "mlp"
    codes: int = 20
    gain: float = 0.2
    canvas: bool = False

    def __post_init__(self) -> None:
        if self.codes < 0:
            raise UserError(f"generator.codes={self.codes} is negative", "give codes per class, or 0 for none")
        if not self.gain > 0:
            raise UserError(f"generator.gain={self.gain}", "give a gain > 0")


@dataclass
class MLPGeneratorConfig(GeneratorConfig):
    """Fully connected generator."""

    name: str = "mlp"
    widths: list[int] = field(default_factory=lambda: [256])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"generator.widths={self.widths}", "give one or more widths >= 1")


@dataclass
class ConvGeneratorConfig(GeneratorConfig):
    """Upsampling convolutional generator with GroupNorm: ``channels`` at full resolution, doubled at each coarser one."""

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
    """No generator: a free image and multipliers for each sample of the batch, the method of the reconstruction peers."""

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
