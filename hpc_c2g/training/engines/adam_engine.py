"""Plain Adam for gradients that are sums over samples: engine of the pilot and of deterministic runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hpc_c2g.distributed.reduction import Summation
from hpc_c2g.generators.networks import FreeImages, Generator
from hpc_c2g.training.config.train import OptimizerConfig
from hpc_c2g.training.engines.engine_state import EngineState, Layout, buffers_of
from hpc_c2g.training.engines.zero_state import whole_layout

BETAS = (0.9, 0.99)


def build_optimizer(module: Generator | FreeImages, config: OptimizerConfig) -> torch.optim.Adam:
    """Return Adam with a learning rate per group of the generator's parameters."""
    rates = {
        "images": config.lr,
        "codes": config.lr_codes,
        "multipliers": config.lr_multipliers,
        "canvases": config.lr_canvases,
    }
    groups = [{"params": params, "lr": rates[name]} for name, params in module.parameter_groups().items()]
    return torch.optim.Adam(groups, lr=config.lr, betas=BETAS)


class OptimizedModule:
    """Base of all engines: a module, its optimizer with learning rates that follow a factor, and their state.

    The methods that read or restore the state, and ``gradient_norm``, are collective: every rank calls them.
    """

    module: nn.Module
    optimizer: Any
    base_lrs: list[float]
    layout: Layout
    full_state: EngineState
    updates: int = 0
    gathers_in_forward: bool = False

    def set_lrs(self, lr_factor: float) -> None:
        """Set every group's learning rate to ``lr_factor`` times its base."""
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * lr_factor

    def gradient_norm(self) -> Tensor:
        """Return the L2 norm of the summed gradient, float64 scalar, the same on all ranks, between ``reduce`` and ``step``. Collective."""
        return self.layout.gradient_norm()

    def weights(self) -> dict[str, Tensor]:
        """Return the module's full ``state_dict``, float32 masters for parameters, on the CPU of every rank. Collective."""
        return self.full_state.weights()

    def state_dict(self) -> dict[str, Any]:
        """Return the layout-free state ``{"weights": {name: tensor}, "moments": {parameter: {"exp_avg": tensor,
        "exp_avg_sq": tensor}}, "updates": int}`` on every rank; any engine on any number of ranks can resume from it. Collective.
        """
        return self.full_state.state_dict(self.updates)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of any engine's ``state_dict``. Collective.

        Raises:
            UserError: The state belongs to another network or format.
        """
        self.updates = self.full_state.load_state_dict(self.module, state)


class AdamEngine(OptimizedModule):
    """Adam on every rank; the gradient is summed by ``summation`` and clipped to ``config.max_grad_norm`` (0: not clipped)."""

    def __init__(self, module: Generator | FreeImages, config: OptimizerConfig, summation: Summation) -> None:
        self.module = module
        self.summation, self.clipping = summation, config.max_grad_norm
        self.optimizer = build_optimizer(module, config)
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.parameters = dict(module.named_parameters())
        self.layout = whole_layout(module, self.parameters)
        self.full_state = EngineState(list(module.state_dict()), buffers_of(module), self.layout, self.optimizer)

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of ``surrogate``, a plain sum over samples."""
        grads = torch.autograd.grad(surrogate, list(self.parameters.values()), materialize_grads=True)
        self.summation.add(dict(zip(self.parameters, grads, strict=True)))

    def reduce(self) -> None:
        """Set every parameter's ``grad`` to the sum over all micro-batches and ranks."""
        for name, grad in self.summation.total().items():
            self.parameters[name].grad = grad

    def step(self, lr_factor: float) -> None:
        """Update at ``lr_factor`` times the base learning rates."""
        if self.clipping:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clipping)
        self.set_lrs(lr_factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
