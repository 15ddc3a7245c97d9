"""Built-in classifiers: MLP, CNN and residual CNN.

All of them are traceable by ``torch.fx`` (the rates are read off the graph) and take a normalized
input ``[B, *input_shape]`` to logits ``[B, C]``. ``bias`` is ``all``, ``first`` or ``none``: a bias in the first layer
alone keeps the net homogeneous, biases everywhere make it quasi-homogeneous.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor, nn

from hpc_c2g.errors import UserError

BIASES = ("all", "first", "none")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def _check(bias: str, activation: str, **positive: int) -> None:
    if bias not in BIASES:
        raise UserError(f"model.bias={bias!r} is unknown", f"choose one of {', '.join(BIASES)}")
    if activation not in ACTIVATIONS:
        raise UserError(f"model.activation={activation!r} is unknown", f"choose one of {', '.join(ACTIVATIONS)}")
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"model.{name}={value} is too small", f"give model.{name} >= 1")


class MLP(nn.Sequential):
    """Fully connected net: ``depth`` weight matrices, ``depth - 1`` hidden layers of ``width`` units."""

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        width: int = 500,
        depth: int = 2,
        activation: str = "relu",
        bias: str = "first",
        batch_norm: bool = False,
    ) -> None:
        _check(bias, activation, width=width, depth=depth)
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        fan_in = prod(input_shape)
        for i in range(1, depth):
            layers[f"linear{i}"] = nn.Linear(fan_in, width, bias=bias == "all" or (bias == "first" and i == 1))
            if batch_norm:
                layers[f"norm{i}"] = nn.BatchNorm1d(width)
            layers[f"act{i}"] = ACTIVATIONS[activation]()
            fan_in = width
        layers["head"] = nn.Linear(fan_in, classes, bias=bias == "all" or (bias == "first" and depth == 1))
        super().__init__(layers)


class CNN(nn.Sequential):
    """``depth - 1`` blocks of 3x3 convolution, activation and 2x2 pooling (while the map is larger than 1), then a head."""

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        width: int = 32,
        depth: int = 3,
        activation: str = "relu",
        bias: str = "first",
        batch_norm: bool = False,
        pooling: str = "avg",
    ) -> None:
        _check(bias, activation, width=width, depth=depth)
        if len(input_shape) != 3:
            raise UserError(f"a CNN needs images, but the input shape is {list(input_shape)}", "use model=mlp")
        if pooling not in ("avg", "max"):
            raise UserError(f"model.pooling={pooling!r} is unknown", "choose avg or max")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, height, side = input_shape
        for i in range(1, depth):
            layers[f"conv{i}"] = nn.Conv2d(
                channels, width, 3, padding=1, bias=bias == "all" or (bias == "first" and i == 1)
            )
            if batch_norm:
                layers[f"norm{i}"] = nn.BatchNorm2d(width)
            layers[f"act{i}"] = ACTIVATIONS[activation]()
            if min(height, side) > 1:
                layers[f"pool{i}"] = nn.AvgPool2d(2) if pooling == "avg" else nn.MaxPool2d(2)
                height, side = height // 2, side // 2
            channels = width
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(
            channels * height * side, classes, bias=bias == "all" or (bias == "first" and depth == 1)
        )
        super().__init__(layers)


class ResidualBlock(nn.Module):
    """``act(norm(conv(act(norm(conv(x))))) + skip(x))``, the skip a 1x1 convolution where the shape changes."""

    def __init__(self, fan_in: int, width: int, stride: int, activation: str, bias: bool, batch_norm: bool) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.BatchNorm2d(width) if batch_norm else nn.Identity()

        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=bias)
        self.norm1 = norm()
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        self.norm2 = norm()
        changes = stride != 1 or fan_in != width
        self.skip = nn.Conv2d(fan_in, width, 1, stride, bias=False) if changes else nn.Identity()
        self.skip_norm = norm() if changes else nn.Identity()
        self.act2 = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, width, H / stride, W / stride]``."""
        branch = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        out: Tensor = self.act2(branch + self.skip_norm(self.skip(x)))
        return out


class ResidualCNN(nn.Sequential):
    """A stem, ``depth`` residual blocks (width doubles and the map halves from the second on), global pooling, a head.

    Without normalization an identity skip forces the branch's rates to zero, so every block then changes its shape.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        width: int = 16,
        depth: int = 2,
        activation: str = "relu",
        bias: str = "first",
        batch_norm: bool = False,
    ) -> None:
        _check(bias, activation, width=width, depth=depth)
        if len(input_shape) != 3:
            raise UserError(f"a residual CNN needs images, but the input shape is {list(input_shape)}", "use model=mlp")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["stem"] = nn.Conv2d(input_shape[0], width, 3, padding=1, bias=bias in ("all", "first"))
        layers["stem_norm"] = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        layers["stem_act"] = ACTIVATIONS[activation]()
        fan_in = width
        for i in range(1, depth + 1):
            out = fan_in if batch_norm and i == 1 else 2 * fan_in
            layers[f"block{i}"] = ResidualBlock(fan_in, out, 1 if i == 1 else 2, activation, bias == "all", batch_norm)
            fan_in = out
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(fan_in, classes, bias=bias == "all")
        super().__init__(layers)


ARCHITECTURES: dict[str, type[nn.Module]] = {"mlp": MLP, "cnn": CNN, "residual_cnn": ResidualCNN}
