"""DeepSpeed engine that owns the generator's weights and optimizer, at any ZeRO stage."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hpc_c2g.distributed.environment import deepspeed_variables
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.generators.networks import FreeImages, Generator
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.engines.adam_engine import OptimizedModule, build_optimizer
from hpc_c2g.training.engines.engine_state import EngineState, buffers_of
from hpc_c2g.training.engines.zero_state import zero_layout

# settings whose state the layout-free state does not hold, by section of DeepSpeed's settings
WITHOUT_STATE = {"fp16": ("enabled",), "zero_optimization": ("offload_optimizer", "offload_param", "zenflow")}
LARGEST_BUCKET = 50_000_000


class DeepSpeedEngine(OptimizedModule):
    """Adam under DeepSpeed for gradients that are *sums* over samples.

    DeepSpeed divides by the number of ranks; ``backward`` undoes it, because the surrogate's gradient is already the exact sum.
    Stages 0 to 2 keep the parameters whole; at stage 3 ``module`` gathers them while it runs, so that every rank must call it.
    Between ranks gradients are summed in float32 at every stage and dtype; over micro-batches too, except at stage 0 in bfloat16.

    Args:
        module: Generator.
        config: Settings of the run; ``config.deepspeed`` overrides the settings made here.
        micro_batches: Number of micro-batches per step and rank.
        world: All ranks, and the device of the module.

    Raises:
        UserError: ``config.deepspeed`` holds a setting that DeepSpeed refuses, or whose state a checkpoint cannot hold.
    """

    def __init__(self, module: Generator | FreeImages, config: TrainConfig, micro_batches: int, world: World) -> None:
        deepspeed = import_deepspeed()
        _refuse_without_state(config.deepspeed)
        names, buffers = list(module.state_dict()), buffers_of(module)
        adam = build_optimizer(module, config.optimizer)
        self.base_lrs = [float(g["lr"]) for g in adam.param_groups]
        elements = sum(p.numel() for p in module.parameters())
        settings = laid_over(deepspeed_settings(config, micro_batches, elements), config.deepspeed)
        try:
            with (
                deepspeed_variables(world.launch, world.device),
                _silenced(),
            ):  # the bfloat16 optimizer reports its memory
                self._engine, self.optimizer, _, _ = deepspeed.initialize(
                    model=module.to(world.device), optimizer=adam, config=settings, dist_init_required=False
                )
        except Exception as error:  # any exception: DeepSpeed checks little before it uses a value
            if not config.deepspeed:
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"deepspeed={config.deepspeed} is refused: {reason}", "correct or drop the setting"
            ) from error
        atexit.unregister(_destroy_process_groups)
        atexit.register(_destroy_process_groups)
        self.module = self._engine.module
        self.gathers_in_forward = config.zero_stage == 3
        if self.gathers_in_forward:
            _run_with_variables(self.module, world)
        self.layout = zero_layout(self._engine, world)
        self.full_state = EngineState(names, buffers, self.layout, adam)
        self._guarded = world.with_rank_check

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of ``surrogate``, a plain sum over samples, to the generator's; at stages 2 and 3 collective."""
        if self._engine.zero_optimization():
            # done by the engine's forward, which the step does not use; without it stage 3 drops earlier micro-batches
            self._engine.optimizer.clear_backward_seen_flag()
        scaled = surrogate * self._engine.dp_world_size
        self._guarded(lambda: self._engine.backward(scaled, scale_wrt_gas=False))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def reduce(self) -> None:
        """Do nothing: DeepSpeed has summed the gradient over ranks by the end of the last backward."""

    def step(self, lr_factor: float) -> None:
        """Update with the summed gradient at ``lr_factor`` times the base learning rates."""
        self.set_lrs(lr_factor)
        self._guarded(self._engine.step)
        self.updates += 1


@functools.cache
def import_deepspeed() -> Any:
    """Import DeepSpeed without its log messages.

    Import it before the process group is initialized: it would keep the group as a default argument, and its threads beyond the
    interpreter. So would the compiler that torch.optim imports at its first use.
    """
    with _silenced():  # build messages of a first import
        import deepspeed
        import torch._dynamo  # noqa: F401
    # DeepSpeed would compile a shared-memory all-reduce on first use: a minute, a compiler, and sums in its own order
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _destroy_process_groups() -> None:
    """Destroy the process groups and DeepSpeed's references to them, which ``World.start`` would leave."""
    comm = import_deepspeed().comm
    if comm.is_initialized():
        comm.destroy_process_group()


def deepspeed_settings(config: TrainConfig, micro_batches: int, elements: int) -> dict[str, Any]:
    """Return DeepSpeed's settings for a run whose generator has ``elements`` weights."""
    low_precision = config.dtype == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed counts calls of backward; samples are counted by the step
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": config.optimizer.max_grad_norm,  # DeepSpeed's own default clips at 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": min(LARGEST_BUCKET, max(1, elements)),  # the buffer is allocated in full
            "contiguous_gradients": True,
            "reduce_scatter": True,
            # true would replace torch's own linear function for the whole process, the classifier's too
            "memory_efficient_linear": False,
        },
        # update as soon as a gradient is available: otherwise stage 1 in bfloat16 counts earlier micro-batches again
        "bf16": {"enabled": low_precision, "immediate_grad_update": low_precision},
        "communication_data_type": "fp32",
        # stage 0 supports only the dtype of the weights
        "data_types": {"grad_accum_dtype": "fp32"} if config.zero_stage else {},
        "steps_per_print": 10**12,
    }


def laid_over(settings: Mapping[str, Any], free: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings`` overridden by the values of ``free``, mappings merged key by key."""
    result = dict(settings)
    for key, value in free.items():
        old = result.get(key)
        result[key] = laid_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


def _run_with_variables(module: nn.Module, world: World) -> None:
    """Set DeepSpeed's variables while the module runs: stage 3 reads them when it compares the ranks' order of layers."""
    held = contextlib.ExitStack()

    def before(*_: object) -> None:
        held.enter_context(deepspeed_variables(world.launch, world.device))

    def after(*_: object) -> None:
        held.close()

    module.register_forward_pre_hook(before, prepend=True)
    module.register_forward_hook(after, always_call=True)


def _refuse_without_state(free: Mapping[str, Any]) -> None:
    for section, names in WITHOUT_STATE.items():
        values = free.get(section)
        if not isinstance(values, Mapping):
            continue
        for name in names:
            if values.get(name):
                raise UserError(
                    f"deepspeed={dict(free)} asks for {section}.{name}, whose state checkpoints do not hold",
                    "drop the setting; dtype=bfloat16 and zero_stage=3 save memory too",
                )
