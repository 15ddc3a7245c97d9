"""Image generators (z, y, k) -> x and the multiplier network (z, y, k) -> h, in one trainable module; k is the member.

Each classifier has its own label space, its own embeddings and its own input box; all share the decoder. No network uses
batch statistics: a sample must not depend on which others share its micro-batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpc_c2g.errors import UserError
from hpc_c2g.generators.config import ConvGeneratorConfig, FreeImagesConfig, GeneratorConfig, MLPGeneratorConfig
from hpc_c2g.generators.latents import Latents
from hpc_c2g.kkt.duality import neutral_logit

EMBEDDING = 64
"""Length of a code, or of the class embedding."""
MULTIPLIER_WIDTHS = (128, 128)
"""Hidden layers of the multiplier network of a generator without codes; with codes it is a table with a row per code."""
OUTPUT_SCALE = 0.3
"""Factor on the last weights of the image network at the start."""
GAIN = 0.2
"""Factor on the continuous latents."""


def _select(table: Tensor, classifier: Tensor) -> Tensor:
    """Row of ``table`` ``[K, ...]`` per sample; a single row is left to broadcast."""
    return table[classifier] if len(table) > 1 else table


class Box(nn.Module):
    """Maps an unbounded ``t`` into the box of the classifier's normalized input space: center + half tanh(t + offset)."""

    center: Tensor
    half_range: Tensor
    offset: Tensor

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        super().__init__()
        center, half = (lower + upper) / 2, (upper - lower) / 2
        self.register_buffer("center", center)
        self.register_buffer("half_range", half)
        # t = 0 is x = 0, the mean of the normalized space, unless that lies at the edge, where tanh saturates
        self.register_buffer("offset", torch.atanh((-center / half).clamp(-0.8, 0.8)))

    def forward(self, t: Tensor, classifier: Tensor) -> Tensor:
        """Inputs ``[B, *S]``, each in the normalized space of its classifier."""
        center, half_range, offset = (_select(b, classifier) for b in (self.center, self.half_range, self.offset))
        x: Tensor = center + half_range * torch.tanh(t + offset)
        return x


def perceptron(widths: list[int], last_scale: float) -> nn.Sequential:
    """ReLU net through ``widths``, its last weight matrix scaled by ``last_scale``."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    last = layers[-2]
    with torch.no_grad():
        last.weight.mul_(last_scale)  # type: ignore[operator]
    return nn.Sequential(*layers[:-1])


class ConvImage(nn.Module):
    """[z, embedding] ``[B, f]`` to an unbounded image ``[B, *S]`` by upsampling convolutions."""

    def __init__(self, features: int, shape: tuple[int, ...], config: ConvGeneratorConfig) -> None:
        super().__init__()
        if len(shape) != 3:
            raise UserError(
                f"generator=conv makes images, the classifier takes inputs of shape {list(shape)}", "use generator=mlp"
            )
        self.shape = shape
        side = max(shape[1:])
        doublings = max(0, math.ceil(math.log2(side / config.coarsest)))
        self.base = math.ceil(side / 2**doublings)
        channels = [config.channels * 2 ** min(i, 3) for i in range(doublings, -1, -1)]
        self.project = nn.Linear(features, channels[0] * self.base**2)
        blocks: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(channels):
            blocks += [
                nn.GroupNorm(8, fan_in),
                nn.ReLU(),
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(fan_in, fan_out, 3, padding=1),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.tail = nn.Sequential(
            nn.GroupNorm(8, channels[-1]), nn.ReLU(), nn.Conv2d(channels[-1], shape[0], 3, padding=1)
        )
        with torch.no_grad():
            self.tail[-1].weight.mul_(OUTPUT_SCALE)  # type: ignore[operator]

    def forward(self, features: Tensor) -> Tensor:
        """The image before the box."""
        maps = self.project(features).unflatten(1, (-1, self.base, self.base))
        image: Tensor = self.tail(self.blocks(maps))
        return image[:, :, : self.shape[1], : self.shape[2]]


class Condition(nn.Module):
    """(z, y, k) to features: z with the class's embedding, or the rest of z with the learned code that z_0 selects."""

    first: Tensor

    def __init__(self, config: GeneratorConfig, dimensions: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.codes, self.gain = config.codes, GAIN
        self.table = nn.Embedding(sum(classes) * max(1, config.codes), EMBEDDING)
        self.features = EMBEDDING + dimensions - (1 if config.codes else 0)
        self.register_buffer("first", first_rows(classes))

    def rows(self, latents: Latents) -> Tensor:
        """Row of the table per sample, ``[B]``."""
        labels: Tensor = _select(self.first, latents.member) + latents.labels
        if not self.codes:
            return labels
        quantile: Tensor = torch.special.ndtr(latents.z[:, 0].double())
        code = (quantile * self.codes).long().clamp(0, self.codes - 1)
        return labels * self.codes + code

    def forward(self, latents: Latents, rows: Tensor) -> Tensor:
        """Features ``[B, features]``; ``rows`` are ``self.rows(latents)``."""
        z = latents.z[:, 1:] if self.codes else latents.z
        return torch.cat([self.gain * z.to(self.table.weight), self.table(rows)], 1)


def first_rows(counts: Sequence[int]) -> Tensor:
    """Index of each member's first row in a table of consecutive blocks of ``counts`` rows; int64 ``[K]``."""
    return torch.tensor([0, *itertools.accumulate(counts)][:-1])


def neutral_logits(classes: Sequence[int]) -> Tensor:
    """Neutral multiplier logit per member, ``[K, 1]``."""
    return torch.tensor([[neutral_logit(count)] for count in classes])


class Generator(nn.Module):
    """Conditional generator of images, and multipliers over the same condition.

    Args:
        config: Settings of the generator.
        dimensions: Dimension of the latents.
        classes: C_k, number of classes per member.
        lower: Lower bounds of the normalized boxes, ``[K, *S]``.
        upper: Upper bounds of the normalized boxes, ``[K, *S]``.
    """

    neutral: Tensor

    def __init__(
        self,
        config: MLPGeneratorConfig | ConvGeneratorConfig,
        dimensions: int,
        classes: Sequence[int],
        lower: Tensor,
        upper: Tensor,
    ) -> None:
        super().__init__()
        shape = tuple(lower.shape[1:])
        self.condition = Condition(config, dimensions, classes)
        features = self.condition.features
        if isinstance(config, ConvGeneratorConfig):
            self.image: nn.Module = ConvImage(features, shape, config)
        else:
            self.image = nn.Sequential(
                perceptron([features, *config.widths, math.prod(shape)], OUTPUT_SCALE), nn.Unflatten(1, shape)
            )
        rows = sum(classes) * max(1, config.codes)
        self.canvas = nn.Embedding(rows, math.prod(shape)) if config.canvas else None
        if self.canvas is not None:
            nn.init.zeros_(self.canvas.weight)
        self.box = Box(lower, upper)
        self.register_buffer("neutral", neutral_logits(classes))
        if config.codes:
            self.multiplier: nn.Module = nn.Embedding(rows, max(classes))
            nn.init.zeros_(self.multiplier.weight)
        else:
            self.multiplier = perceptron([features, *MULTIPLIER_WIDTHS, max(classes)], 1.0)

    def forward(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """x ``[B, *S]`` in each classifier's normalized space, and the multiplier logits h ``[B, max C_k]``."""
        rows = self.condition.rows(latents)
        features = self.condition(latents, rows)
        h = self.multiplier(rows if self.condition.codes else features)
        t = self.image(features)
        if self.canvas is not None:
            t = t + self.canvas(rows).view_as(t)
        return self.box(t, latents.member), h + _select(self.neutral, latents.member)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by learning rate: images, codes, multipliers, canvases where there are any."""
        groups: dict[str, nn.Module] = {
            "images": self.image,
            "codes": self.condition,
            "multipliers": self.multiplier,
        }
        if self.canvas is not None:
            groups["canvases"] = self.canvas
        return {name: list(module.parameters()) for name, module in groups.items()}


class FreeImages(nn.Module):
    """One free image and one row of multiplier logits per sample of the batch.

    Args:
        config: Settings of the free images.
        counts: B_k, number of images per member.
        classes: C_k, number of classes per member.
        shape: Shape of one image ``[*S]``.

    Raises:
        UserError: a member has fewer images than classes.
    """

    first: Tensor
    count: Tensor
    whole: Tensor

    def __init__(
        self, config: FreeImagesConfig, counts: Sequence[int], classes: Sequence[int], shape: Sequence[int]
    ) -> None:
        super().__init__()
        for count, most in zip(counts, classes, strict=True):
            if count < most:
                raise UserError(
                    f"global_batch={sum(counts)} is too small for generator=free: {count} images for {most} classes",
                    "give an image per class of every classifier",
                )
        self.counts = list(counts)
        self.image = nn.Parameter(config.start * torch.randn(sum(counts), *shape))
        neutral = neutral_logits(classes).repeat_interleave(torch.tensor(counts), 0)
        self.multiplier = nn.Parameter(neutral.expand(-1, max(classes)).clone())
        self.register_buffer("first", first_rows(counts))
        # indices beyond the count wrap around after equally many images of each class
        self.register_buffer("whole", torch.tensor([n - n % c for n, c in zip(counts, classes, strict=True)]))
        self.register_buffer("count", torch.tensor(self.counts))

    def forward(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """x ``[B, *S]`` and the multiplier logits h ``[B, max C_k]``."""
        k, index = latents.member, latents.index
        index = torch.where(index < _select(self.count, k), index, index % _select(self.whole, k))
        places = _select(self.first, k) + index
        return self.image[places], self.multiplier[places]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by learning rate: images, multipliers."""
        return {"images": [self.image], "multipliers": [self.multiplier]}


def build_generator(
    config: GeneratorConfig,
    dimensions: int,
    classes: Sequence[int],
    counts: Sequence[int],
    lower: Tensor,
    upper: Tensor,
    seed: int,
) -> Generator | FreeImages:
    """Build the network that ``config`` names, initialized from ``seed`` without touching the global random state.

    Args:
        config: Settings of the generator.
        dimensions: Dimension of the latents.
        classes: C_k, number of classes per member.
        counts: Number of free images per member.
        lower: Lower bounds of the normalized boxes, ``[K, *S]``.
        upper: Upper bounds of the normalized boxes, ``[K, *S]``.
        seed: Seed of the initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, FreeImagesConfig):
            return FreeImages(config, counts, classes, lower.shape[1:])
        if isinstance(config, (MLPGeneratorConfig, ConvGeneratorConfig)):
            return Generator(config, dimensions, classes, lower, upper)
    raise UserError(f"generator.name={config.name!r} is unknown", "choose generator=mlp, conv or free")
