"""Available memory of this rank, the memory of its classifiers, and the largest micro-batch that fits beside them."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError
from hpc_c2g.training.config.train import TrainConfig
from hpc_c2g.training.cost.dry_run import DryRun, generator_without_numbers, largest_micro_batch
from hpc_c2g.units import GIB

COPIES = 4
"""float32 tensors of a classifier's size on a rank: theta, the traced graph's copy, the bucket of G, the residual (later direction)."""
MARGIN = 0.2
"""Share of the memory that is kept free for kernels' workspaces, fragmentation and libraries."""
CGROUP, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_bytes(world: World) -> float:
    """Return the bytes available to this rank: free on its GPU, or its share of the free memory of its node and control group."""
    if world.device.type == "cuda":
        return float(torch.cuda.mem_get_info(world.device)[0])
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024.0 * int(facts["MemAvailable"].split()[0])
    return max(0.0, min(free, _left_in_control_groups())) / world.launch.local_world_size


def _left_in_control_groups() -> float:
    """Return the bytes that the control groups (version 2) above this process still allow: a container's or a batch system's limit."""
    try:
        own = next(line for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::")).removeprefix("0::/")
    except (OSError, StopIteration):
        return float("inf")
    left = float("inf")
    folder = CGROUP / own
    for group in (folder, *folder.parents):
        if not group.is_relative_to(CGROUP):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            used = float((group / "memory.current").read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit != "max":  # cached files can be evicted
            left = min(left, float(limit) - used + float(statistics.get("inactive_file", 0)))
    return left


def _kkt_bytes(bundles: list[Bundle], mesh: Mesh) -> int:
    """Return the bytes that this rank's classifiers take for their KKT sums."""
    return COPIES * sum(4 * p.numel() for k in mesh.local_members for p in bundles[k].parameters.values())


def check_classifiers(bundles: list[Bundle], mesh: Mesh, free: float) -> None:
    """Check that the KKT sums of this rank's classifiers fit into its memory.

    Raises:
        UserError: They do not fit.
    """
    needed = _kkt_bytes(bundles, mesh)
    if needed > free * (1 - MARGIN):
        raise UserError(
            f"{len(mesh.local_members)} classifiers x solutions per process need {needed / GIB:.2f} GiB for their KKT sums,"
            f" {free * (1 - MARGIN) / GIB:.2f} GiB are there",
            f"start more processes, so that distributed.groups={mesh.groups} can grow, or train fewer at once",
        )


def largest_that_fits(bundles: list[Bundle], config: TrainConfig, mesh: Mesh, free: float) -> int:
    """Return the largest micro-batch for which the costliest classifier fits on every rank, for ``micro_batch=auto``; collective.

    Raises:
        UserError: Not even one sample fits.
    """
    share = -(-config.global_batch // mesh.data.size)
    dry = {
        id(bundles[k]): DryRun(bundles[k], config) for k in mesh.local_members
    }  # solutions share a bundle, and cost the same
    # weights, their gradient and Adam's two moments, as if nothing were sharded; the sums of all of this rank's classifiers
    held = 16 * sum(p.numel() for p in generator_without_numbers(config, bundles).parameters())
    room = free * (1 - MARGIN) - held - _kkt_bytes(bundles, mesh)
    fitting = []
    for one in dry.values():

        def needed(samples: int, one: DryRun = one) -> int:
            return one.working_bytes(samples, samples == share)

        fitting.append(largest_micro_batch(needed, room, share))
    found = mesh.world.all_gather_object((min(fitting), room))
    least = min(range(len(found)), key=lambda rank: found[rank][0])
    if found[least][0] < 1:
        raise UserError(
            f"micro_batch=auto: not one sample fits into {found[least][1] / GIB:.2f} GiB of rank {least}, beside"
            " classifiers and generator",
            "take a smaller generator or classifier, or processes with more memory",
        )
    return found[least][0]
