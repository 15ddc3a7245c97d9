"""Plain Adam for gradients that are sums over samples: the pilot's engine, and the one whose bits do not depend on the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hpc_c2g.distributed.reduction import Summation
from hpc_c2g.generators.networks import FreeImages, Generator
from hpc_c2g.training.config import OptimiserConfig


def build_optimiser(module: Generator | FreeImages, config: OptimiserConfig) -> torch.optim.Adam:
    """Adam with a learning rate per group of the generator's parameters."""
    rates = {"images": config.rate, "codes": config.code_rate, "multipliers": config.multiplier_rate}
    groups = [{"params": params, "lr": rates[name]} for name, params in module.parameter_groups().items()]
    return torch.optim.Adam(groups, lr=config.rate, betas=(config.betas[0], config.betas[1]))


class OptimisedModule:
    """What every engine has: a module, its optimiser with learning rates that follow a factor, and their state."""

    module: nn.Module
    optimiser: Any
    base_rates: list[float]

    def set_rates(self, rate_factor: float) -> None:
        """Every group's learning rate at ``rate_factor`` times its base."""
        for group, base in zip(self.optimiser.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate_factor

    def weights(self) -> dict[str, Tensor]:
        """The module's state in full."""
        return self.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser state."""
        return {"module": self.module.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])


class AdamEngine(OptimisedModule):
    """Adam on every rank, the gradient summed by ``summation`` and clipped to ``config.gradient_clipping`` (0: not)."""

    def __init__(self, module: Generator | FreeImages, config: OptimiserConfig, summation: Summation) -> None:
        self.module = module
        self.summation, self.clipping = summation, config.gradient_clipping
        self.optimiser = build_optimiser(module, config)
        self.base_rates = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.parameters = dict(module.named_parameters())

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of ``surrogate``, a plain sum over samples."""
        grads = torch.autograd.grad(surrogate, list(self.parameters.values()), materialize_grads=True)
        self.summation.add(dict(zip(self.parameters, grads, strict=True)))

    def reduce(self) -> None:
        """Make every parameter's ``grad`` the sum over all micro-batches and ranks."""
        for name, grad in self.summation.total().items():
            self.parameters[name].grad = grad

    def gradient_norm(self) -> Tensor:
        """Of the reduced gradient."""
        return get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def step(self, rate_factor: float) -> None:
        """Update at ``rate_factor`` times the base learning rates."""
        if self.clipping:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clipping)
        self.set_rates(rate_factor)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
