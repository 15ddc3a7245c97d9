"""The DeepSpeed engine that owns the generator's weights and optimiser."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from torch import Tensor
from torch.nn.utils import get_total_norm

from hpc_c2g.distributed.environment import deepspeed_variables
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import C2GError
from hpc_c2g.generators.networks import FreeImages, Generator
from hpc_c2g.training.adam_engine import OptimisedModule, build_optimiser
from hpc_c2g.training.config import TrainConfig


class DeepSpeedEngine(OptimisedModule):
    """Adam under DeepSpeed for gradients that are *sums* over samples.

    DeepSpeed divides by the number of accumulated micro-batches and by the number of ranks; ``backward`` undoes both, because the
    surrogate's gradient is already the exact sum.

    Args:
        module: the generator.
        config: of the run; ``config.deepspeed`` is laid over the settings made here.
        micro_batches: per step and rank.
        world: the ranks, and the device where the module lives.
    """

    def __init__(self, module: Generator | FreeImages, config: TrainConfig, micro_batches: int, world: World) -> None:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):  # build messages of a first import
            import deepspeed
        # DeepSpeed would compile a shared-memory all-reduce on first use: a minute, a compiler, and sums in its own order
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        optimiser = build_optimiser(module, config.optimiser)
        self.base_rates = [float(g["lr"]) for g in optimiser.param_groups]
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed counts calls of backward; samples are counted by the step
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": config.optimiser.gradient_clipping,  # DeepSpeed's own default clips at 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 0},
            "bf16": {"enabled": config.dtype == "bfloat16"},
            "steps_per_print": 10**12,
            **config.deepspeed,
        }
        try:
            with deepspeed_variables(world.launch):
                self._engine, self.optimiser, _, _ = deepspeed.initialize(
                    model=module.to(world.device), optimizer=optimiser, config=settings, dist_init_required=False
                )
        except Exception as error:  # of any kind: DeepSpeed checks little before it uses a value
            if not config.deepspeed:
                raise
            reason = " ".join(str(error).split())
            raise C2GError(
                f"deepspeed={config.deepspeed} is refused: {reason}", "correct or drop the setting"
            ) from error
        if self._engine.zero_optimization_stage():  # its optimiser state is neither plain tensors nor bitwise resumable
            raise C2GError(
                f"deepspeed={config.deepspeed} asks for ZeRO, which checkpoints do not support", "drop the setting"
            )
        self.module = self._engine.module
        self._undo_averaging = micro_batches * self._engine.dp_world_size

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of ``surrogate``, a plain sum over samples, to the generator's."""
        self._engine.backward(surrogate * self._undo_averaging)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def reduce(self) -> None:
        """Nothing is left to do: DeepSpeed sums the gradient over ranks within the last backward."""

    def gradient_norm(self) -> Tensor:
        """Of the reduced gradient."""
        return get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def step(self, rate_factor: float) -> None:
        """Update with the summed gradient at ``rate_factor`` times the base learning rates."""
        self.set_rates(rate_factor)
        self._engine.step()
