"""Input normalization of a classifier; part of the bundle, stored with the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_c2g.errors import UserError


@dataclass(frozen=True)
class Normalization:
    """x = (raw - mean) / scale, all tensors broadcast to the input shape ``[*S]``, in raw units (pixels in 0..1).

    Attributes:
        mean: Mean to subtract, ``[*S]``.
        scale: Positive divisor, ``[*S]``.
        lower: Smallest raw value, ``[*S]``.
        upper: Largest raw value, ``[*S]``.
    """

    mean: Tensor
    scale: Tensor
    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        for name in ("mean", "scale", "lower", "upper"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise UserError(f"normalization.{name} holds NaN or infinite values", "give finite numbers")
        if not bool((self.scale > 0).all()):
            raise UserError(f"normalization.scale has an entry of {float(self.scale.min())}", "every entry must be > 0")
        if not bool((self.lower < self.upper).all()):
            raise UserError(
                "normalization.range is empty: lower >= upper somewhere", "give the raw value range, such as [0, 1]"
            )

    @classmethod
    def constant(
        cls,
        shape: tuple[int, ...],
        mean: float | list[float] | Tensor = 0.0,
        scale: float | list[float] | Tensor = 1.0,
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> Normalization:
        """Build from a scalar, one number per channel, or a full tensor; raises UserError if the shape cannot match."""

        def expand(name: str, value: float | list[float] | Tensor) -> Tensor:
            tensor = torch.as_tensor(value, dtype=torch.float64)
            if tensor.ndim == 1 and tensor.shape != shape and tensor.numel() == shape[0]:
                tensor = tensor.reshape(-1, *[1] * (len(shape) - 1))
            try:
                return tensor.expand(shape).clone()
            except RuntimeError:
                raise UserError(
                    f"normalization.{name} has shape {list(tensor.shape)}, the input has {list(shape)}",
                    "give one number, one per channel, or the full shape",
                ) from None

        return cls(
            expand("mean", mean),
            expand("scale", scale),
            expand("range", value_range[0]),
            expand("range", value_range[1]),
        )

    def normalize(self, raw: Tensor) -> Tensor:
        """Map raw values ``[B, *S]`` to the classifier's input space."""
        return (raw - self.mean.to(raw)) / self.scale.to(raw)

    def denormalize(self, x: Tensor) -> Tensor:
        """Map the classifier's input space ``[B, *S]`` to raw values."""
        return x * self.scale.to(x) + self.mean.to(x)

    def box(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of the classifier's input space, each ``[*S]``."""
        return self.normalize(self.lower), self.normalize(self.upper)
