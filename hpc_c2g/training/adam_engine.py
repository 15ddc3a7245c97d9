"""Plain Adam for gradients that are sums over samples: the pilot's engine, and the one whose bits do not depend on the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hpc_c2g.distributed.reduction import Summation
from hpc_c2g.generators.networks import FreeImages, Generator
from hpc_c2g.training.config import OptimiserConfig
from hpc_c2g.training.engine_state import EngineState, Layout, buffers_of
from hpc_c2g.training.zero_state import whole_layout


def build_optimiser(module: Generator | FreeImages, config: OptimiserConfig) -> torch.optim.Adam:
    """Adam with a learning rate per group of the generator's parameters."""
    rates = {
        "images": config.rate,
        "codes": config.code_rate,
        "multipliers": config.multiplier_rate,
        "canvases": config.canvas_rate,
    }
    groups = [{"params": params, "lr": rates[name]} for name, params in module.parameter_groups().items()]
    return torch.optim.Adam(groups, lr=config.rate, betas=(config.betas[0], config.betas[1]))


class OptimisedModule:
    """What every engine has: a module, its optimiser with learning rates that follow a factor, and their state.

    The methods that read or restore the state, and ``gradient_norm``, are collective: every rank calls them.
    """

    module: nn.Module
    optimiser: Any
    base_rates: list[float]
    layout: Layout
    full_state: EngineState
    updates: int = 0
    gathers_in_forward: bool = False

    def set_rates(self, rate_factor: float) -> None:
        """Every group's learning rate at ``rate_factor`` times its base."""
        for group, base in zip(self.optimiser.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate_factor

    def gradient_norm(self) -> Tensor:
        """L2 norm of the summed gradient, float64 scalar, the same on every rank; between ``reduce`` and ``step``. Collective."""
        return self.layout.gradient_norm()

    def weights(self) -> dict[str, Tensor]:
        """The module's ``state_dict`` in full, float32 masters for parameters, on the CPU of every rank. Collective."""
        return self.full_state.weights()

    def state_dict(self) -> dict[str, Any]:
        """On every rank the layout-free state ``{"weights": {name: tensor}, "moments": {parameter: {"exp_avg": tensor,
        "exp_avg_sq": tensor}}, "updates": int}``: any engine on any number of ranks goes on from it. Collective.
        """
        return self.full_state.state_dict(self.updates)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what any engine's ``state_dict`` returned. Collective.

        Raises:
            C2GError: the state is of another network or format.
        """
        self.updates = self.full_state.load_state_dict(self.module, state)


class AdamEngine(OptimisedModule):
    """Adam on every rank, the gradient summed by ``summation`` and clipped to ``config.gradient_clipping`` (0: not)."""

    def __init__(self, module: Generator | FreeImages, config: OptimiserConfig, summation: Summation) -> None:
        self.module = module
        self.summation, self.clipping = summation, config.gradient_clipping
        self.optimiser = build_optimiser(module, config)
        self.base_rates = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.parameters = dict(module.named_parameters())
        self.layout = whole_layout(module, self.parameters)
        self.full_state = EngineState(list(module.state_dict()), buffers_of(module), self.layout, self.optimiser)

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of ``surrogate``, a plain sum over samples."""
        grads = torch.autograd.grad(surrogate, list(self.parameters.values()), materialize_grads=True)
        self.summation.add(dict(zip(self.parameters, grads, strict=True)))

    def reduce(self) -> None:
        """Make every parameter's ``grad`` the sum over all micro-batches and ranks."""
        for name, grad in self.summation.total().items():
            self.parameters[name].grad = grad

    def step(self, rate_factor: float) -> None:
        """Update at ``rate_factor`` times the base learning rates."""
        if self.clipping:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clipping)
        self.set_rates(rate_factor)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.updates += 1
