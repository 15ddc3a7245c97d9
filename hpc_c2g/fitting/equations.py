"""Number of equations of the first layer's stationarity: one column of gates each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_RECTIFIERS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_)


class _FirstGates(TorchFunctionMode):
    """Records the gates z > 0 of the first rectifier that runs, ``[B, units]``."""

    gates: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.gates is None and func in _RECTIFIERS:
            self.gates = (args[0] > 0).flatten(1)
        return func(*args, **(kwargs or {}))


def count_equations(model: nn.Module, x: Tensor, size: int = 256) -> int:
    """Distinct non-constant columns of the first gate matrix ``[n, units]`` times the input dimension, at most the number of parameters.

    Args:
        model: Classifier; without a rectifier, the number of parameters of its first layer is returned.
        x: Normalized inputs ``[n, *S]``.
        size: Samples per forward pass.
    """
    gates = []
    for micro_batch in torch.split(x, size):
        with torch.no_grad(), _FirstGates() as tap:
            model(micro_batch)
        gates += [tap.gates] if tap.gates is not None else []
    sizes = {k: p.numel() for k, p in model.named_parameters()}
    if not gates:
        layer = next(iter(sizes)).rpartition(".")[0]
        return sum(size for k, size in sizes.items() if k.rpartition(".")[0] == layer)
    columns = torch.cat(gates).T.cpu().numpy()
    patterns = len(np.unique(np.packbits(columns[columns.any(1) & ~columns.all(1)], axis=1), axis=0))
    return min(patterns * x[0].numel(), sum(sizes.values()))
