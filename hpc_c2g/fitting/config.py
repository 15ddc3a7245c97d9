"""Typed settings of the verbs ``classifier`` and ``certify``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpc_c2g.data.config import DataConfig
from hpc_c2g.errors import UserError, require

KINDS = ("mean_image", "standard", "constant")


@dataclass
class InitConfig:
    """Initial weights: first ~ N(0, first^2), hidden ~ N(0, hidden^2 / fan_in), head ~ U(+-head / sqrt(fan_in)), biases like the first.

    ``default`` leaves PyTorch's own initialization. ``norm`` is what the weights of normalization layers start from, with ``default`` too;
    None keeps them, which is 1: what a wide layer's weights still mostly are when the margin is reached.
    """

    default: bool = False
    first: float = 0.01
    hidden: float = 0.3
    head: float = 1.0
    norm: float | None = None

    def __post_init__(self) -> None:
        if self.norm is not None and not self.norm > 0:
            raise UserError(f"init.norm={self.norm} is not positive", "give init.norm > 0, or null")


@dataclass
class FitConfig:
    """How the weights come about."""

    name: str = "???"


@dataclass
class MarginFitConfig(FitConfig):
    """Rescaled gradient flow to a margin.

    Attributes:
        target_margin: the smallest margin at which it stops.
        lr: drop of the smoothed margin's exponent per step.
        max_steps: gives up (with an error) after so many steps.
        dtype: float64 or float32.
    """

    name: str = "margin"
    target_margin: float = 300.0
    lr: float = 0.05
    max_steps: int = 100_000
    dtype: str = "float64"

    def __post_init__(self) -> None:
        _positive(target_margin=self.target_margin, lr=self.lr, max_steps=self.max_steps)
        _dtype(self.dtype)


@dataclass
class OrdinaryFitConfig(FitConfig):
    """Minibatch training on cross-entropy, as people do it."""

    name: str = "ordinary"
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 32
    epochs: int = 100
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _positive(lr=self.lr, batch_size=self.batch_size, epochs=self.epochs)
        _dtype(self.dtype)
        if self.optimizer not in ("sgd", "adam"):
            raise UserError(f"fit.optimizer={self.optimizer!r} is unknown", "choose sgd or adam")


@dataclass
class ImportFitConfig(FitConfig):
    """No fit: a user's own weights, from a state_dict file (torch or safetensors, never unpickled code)."""

    name: str = "import"
    state_dict: str = "???"


FITS: dict[str, type[FitConfig]] = {"margin": MarginFitConfig, "ordinary": OrdinaryFitConfig, "import": ImportFitConfig}


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"fit.{name}={value} is not positive", f"give fit.{name} > 0")


def _dtype(name: str) -> None:
    if name not in ("float32", "float64"):
        raise UserError(f"fit.dtype={name!r} is unknown", "choose float32 or float64")


@dataclass
class NormalizationConfig:
    """What the classifier subtracts.

    Attributes:
        kind: ``mean_image`` subtracts the mean of the training part, ``standard`` also divides each entry by its deviation (1 where it
            is constant), ``constant`` takes ``mean`` and ``scale``.
        mean: a number, one per channel, or the full shape.
        scale: likewise, what it is divided by.
        value_range: smallest and largest raw value; None takes the data set's.
    """

    kind: str = "mean_image"
    mean: Any = 0.0
    scale: Any = 1.0
    value_range: list[float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"normalization.kind={self.kind!r} is unknown", f"choose {', '.join(KINDS)}")
        if self.value_range is not None and len(self.value_range) != 2:
            raise UserError(f"normalization.value_range={self.value_range}", "give two numbers, such as [0, 1]")


@dataclass
class ClassifierConfig:
    """A classifier bundle to make.

    Attributes:
        out: its folder.
        seed: of the initial weights and minibatches.
        data: what it is fitted to; not read by ``fit=import``.
        model: ``_target_`` (built-in name or import path of an nn.Module; mlp) and its keyword arguments.
        init: initial weights.
        fit: to the margin, ordinary, or imported weights.
        normalization: of the input.
        input_shape: only for ``fit=import``: of one sample.
        classes: only for ``fit=import``: the number or the names.
        overwrite: replace another classifier in ``out``.
    """

    out: str = "???"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    init: InitConfig = field(default_factory=InitConfig)
    fit: FitConfig = field(default_factory=MarginFitConfig)
    normalization: NormalizationConfig = field(default_factory=NormalizationConfig)
    input_shape: list[int] | None = None
    classes: Any = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "give a seed from 0 to 2^63 - 1")
        self.model = {
            "_target_": "mlp",
            **self.model,
        }  # as a field's default it would stand in for model=custom's missing one


@dataclass
class CertifyConfig:
    """What to certify.

    Attributes:
        classifier: folder of the bundle; certificate.json is written into it.
        data: its own training data; None takes what its record names.
    """

    classifier: str = "???"
    data: DataConfig | None = None
