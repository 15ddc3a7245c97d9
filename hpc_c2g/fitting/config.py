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

    ``default`` keeps PyTorch's own initialization. ``norm`` is the initial weight of normalization layers, also with ``default``; None
    keeps PyTorch's 1, which in a wide layer hardly changes until the margin is reached.

    Attributes:
        default: Keep PyTorch's own initialization.
        first: Standard deviation of the first layer's weights, and of all biases.
        hidden: Factor on the hidden weights' standard deviation 1 / sqrt(fan_in).
        head: Factor on the last weights' half range 1 / sqrt(fan_in).
        norm: Initial weight of normalization layers; None keeps PyTorch's.
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
    """Common settings of all fits.

    Attributes:
        name: Kind of fit.
    """

    name: str = "???"


@dataclass
class MarginFitConfig(FitConfig):
    """Rescaled gradient flow to a margin.

    Attributes:
        target_margin: Smallest margin at which the fit stops.
        lr: Decrease of the smoothed margin's exponent per step.
        max_steps: Number of steps after which the fit fails.
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
    """Ordinary minibatch training on cross-entropy.

    Attributes:
        optimizer: ``adam`` or ``sgd``.
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of the optimizer.
        batch_size: Samples per minibatch.
        epochs: Number of passes over the training data.
        dtype: float64 or float32.
    """

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
    """No fit: a user's own weights, from a state_dict file (torch or safetensors, never unpickled code).

    Attributes:
        state_dict: Path of the weights.
    """

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
    """Input normalization of the classifier.

    Attributes:
        kind: ``mean_image`` subtracts the mean of the training part, ``standard`` also divides each entry by its deviation (1 where it
            is constant), ``constant`` takes ``mean`` and ``scale``.
        mean: Mean to subtract: one number, one per channel, or the full shape.
        scale: Divisor: one number, one per channel, or the full shape.
        value_range: Smallest and largest raw value; None takes the data set's.
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
    """Settings of ``c2g classifier``, which makes a bundle.

    Attributes:
        out: Folder of the bundle.
        seed: Seed of the initial weights and minibatches.
        data: Training data; not read by ``fit=import``.
        model: ``_target_`` (built-in name or import path of an nn.Module; mlp) and its keyword arguments.
        init: Initial weights.
        fit: Kind of fit: to a margin, ordinary, or imported weights.
        normalization: Input normalization.
        input_shape: Shape of one sample, only for ``fit=import``.
        classes: Number or names of the classes, only for ``fit=import``.
        overwrite: Replace another classifier in ``out``.
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
    """Settings of ``c2g certify``.

    Attributes:
        classifier: Folder of the bundle; certificate.json is written into it.
        data: Training data of the classifier; None takes those of its fit record.
    """

    classifier: str = "???"
    data: DataConfig | None = None
