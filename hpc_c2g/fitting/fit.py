"""Fitting classifiers: to a large margin by rescaled gradient flow, or by ordinary minibatch training.

The margin fit follows the gradient flow of cross-entropy with time rescaled: full-batch gradient descent on the smoothed margin
log sum_{i, j != y_i} exp(-m_ij) with step lr / ||grad||^2. It cannot underflow and reaches a margin of 300 in seconds, where
plain gradient descent needs 1e6 epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_c2g.errors import UserError
from hpc_c2g.fitting.config import InitConfig, MarginFitConfig, OrdinaryFitConfig
from hpc_c2g.kkt.margins import other_classes, pairwise_margins, smallest_margins

_BatchNorm = (
    nn.modules.batchnorm._BatchNorm
)  # private, but the only common base class of BatchNorm1d to 3d and SyncBatchNorm
NORMS_WITH_UNIT_WEIGHT = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
Report = Callable[[int, float], None]
"""Progress callback: (step, smoothed margin or loss)."""


def initialize(model: nn.Module, config: InitConfig, seed: int) -> None:
    """Draw new weights from ``seed``; normalization layers keep theirs (weight 1, bias 0), except for ``config.norm``."""
    for module in model.modules():
        if config.norm is not None and isinstance(module, NORMS_WITH_UNIT_WEIGHT) and module.weight is not None:
            nn.init.constant_(module.weight, config.norm)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for i, layer in enumerate(layers):
            layer.reset_parameters()
            if config.default:
                continue
            fan_in = layer.weight[0].numel()
            if i == len(layers) - 1:
                layer.weight.uniform_(-config.head / math.sqrt(fan_in), config.head / math.sqrt(fan_in))
            else:
                layer.weight.normal_(0, config.first if i == 0 else config.hidden / math.sqrt(fan_in))
            if layer.bias is not None:
                layer.bias.normal_(0, config.first)


def smoothed_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log sum_{i, j != y_i} exp(-m_ij), a smooth upper bound of minus the smallest margin."""
    margins = pairwise_margins(logits, labels)
    return torch.logsumexp(-margins[other_classes(labels, logits.shape[1])], 0)


def fit_margin(
    model: nn.Module, x: Tensor, labels: Tensor, config: MarginFitConfig, report: Report | None = None
) -> int:
    """Full-batch rescaled gradient flow until the smallest margin of ``x`` ``[n, *S]`` reaches the target; returns the steps.

    BatchNorm uses the statistics of the full batch; they are frozen into its running statistics at the end.

    Raises:
        UserError: the target is not reached in ``max_steps``, or the loss is not finite.
    """
    dtype = getattr(torch, config.dtype)
    model.to(dtype).train().requires_grad_(True)
    x = x.to(dtype)
    parameters = list(model.parameters())
    lr, previous = config.lr, math.inf
    for step in range(1, config.max_steps + 1):
        logits = model(x)
        loss = smoothed_margin(logits, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"fitting diverged at step {step}: the smoothed margin is {value}", "lower fit.lr or init.hidden"
            )
        # a flow only descends: halve the step after an overshoot
        lr = max(lr / 2, 1e-4 * config.lr) if value > previous else min(lr * 1.05, config.lr)
        previous = value
        if (
            value < 0
            and float(smallest_margins(pairwise_margins(logits, labels), labels).detach().min()) >= config.target_margin
        ):
            _freeze_statistics(model, x)
            return step
        if report is not None and step % 50 == 0:
            report(step, -value)
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.square().sum() for g in grads]).sum()
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(grad * (lr / norm))
    raise UserError(
        f"fit.max_steps={config.max_steps} passed with a smoothed margin of {-previous:.3g}, target {config.target_margin}",
        "raise fit.max_steps, widen the model or lower fit.target_margin",
    )


def fit_ordinary(
    model: nn.Module, x: Tensor, labels: Tensor, config: OrdinaryFitConfig, seed: int, report: Report | None = None
) -> int:
    """Minibatch SGD or Adam on cross-entropy; returns the steps taken."""
    dtype = getattr(torch, config.dtype)
    model.to(dtype).train().requires_grad_(True)
    x = x.to(dtype)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    normalized = any(isinstance(m, _BatchNorm) for m in model.modules())
    step = 0
    for _ in range(config.epochs):
        for batch in torch.split(torch.randperm(len(x), generator=generator), config.batch_size):
            if len(batch) == 1 and normalized:
                continue  # batch statistics of one sample are undefined
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if report is not None and step % 50 == 0:
                report(step, float(loss.detach()))
    model.eval()
    return step


@torch.no_grad()
def _freeze_statistics(model: nn.Module, x: Tensor) -> None:
    """Set the running statistics to those of the full batch, so that eval mode is the fitted function (up to the variance's n - 1)."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
