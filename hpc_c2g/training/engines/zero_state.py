"""Locations of DeepSpeed's masters, moments and reduced gradients at each ZeRO stage (DeepSpeed 0.19; its own helpers do not
restore padded ZeRO-3 partitions, and support no moments before the first step)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc_c2g.distributed.world import World
from hpc_c2g.training.engines.engine_state import Fragment, Layout


def whole_layout(module: nn.Module, masters: Mapping[str, Tensor]) -> Layout:
    """Return the layout in which every rank holds everything.

    Args:
        module: Module whose parameters' ``grad`` is the reduced gradient.
        masters: Masters by parameter name: the parameter itself, or the float32 master of a low-precision one.
    """
    parameters = dict(module.named_parameters())

    @torch.no_grad()
    def publish() -> None:
        for name, parameter in parameters.items():
            if parameter is not masters[name]:
                parameter.copy_(masters[name])

    return Layout(
        {name: p.shape for name, p in parameters.items()},
        {name: Fragment(masters[name], 0, 0, p.numel()) for name, p in parameters.items()},
        list(masters.values()),
        lambda: [p.grad for p in parameters.values() if p.grad is not None],
        publish,
    )


def zero_layout(engine: Any, world: World) -> Layout:
    """Return the layout of a DeepSpeed engine, by its stage and by the optimizer that DeepSpeed chose for the dtype."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return _partitioned_parameters(engine.module, optimizer, world)
    if stage:
        return _partitioned_masters(engine.module, optimizer, world)
    if hasattr(optimizer, "fp32_groups"):  # bfloat16
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return whole_layout(engine.module, {name: masters[id(p)] for name, p in engine.module.named_parameters()})
    return whole_layout(engine.module, dict(engine.module.named_parameters()))


def _partitioned_masters(module: nn.Module, optimizer: Any, world: World) -> Layout:
    """Return the layout of stages 1 and 2: one flat master per group, of which each rank has an equal part; whole parameters."""
    masters = [group["params"][0] for group in optimizer.param_groups]
    fragments = {}
    for name, parameter in module.named_parameters():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            fragments[name] = Fragment(masters[mapping.param_group_index], here.start, there.start, here.numel)

    def gradients() -> list[Tensor]:
        if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # stage 1 in bfloat16
            return list(optimizer.fp32_groups_gradient_flat_partition)
        return [g for group in optimizer.averaged_gradients.values() for g in group]

    shapes = {name: p.shape for name, p in module.named_parameters()}
    return Layout(shapes, fragments, masters, gradients, optimizer.update_lp_params, world.sum)


def _partitioned_parameters(module: nn.Module, optimizer: Any, world: World) -> Layout:
    """Return the layout of stage 3: each rank has an equal, padded part of every parameter, one after the other in flat masters."""
    masters = optimizer.fp32_partitioned_groups_flat
    shapes, fragments = {}, {}
    for name, parameter in module.named_parameters():
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
        offset = world.rank * size
        shapes[name] = shape
        if offset < shape.numel():
            fragments[name] = Fragment(masters[group], start, offset, min(size, shape.numel() - offset))

    def gradients() -> list[Tensor]:
        return [g for group in optimizer.averaged_gradients.values() for g in group]

    def publish() -> None:  # the same calls as in DeepSpeed's update
        optimizer._partition_all_parameters()
        for index in range(len(masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    return Layout(shapes, fragments, masters, gradients, publish, world.sum)
