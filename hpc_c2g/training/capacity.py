"""What fits: the memory at hand on this rank, the classifiers that it must hold, and the largest micro-batch beside them."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc_c2g.classifiers.bundle import Bundle
from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import C2GError
from hpc_c2g.training.config import TrainConfig
from hpc_c2g.training.dry_run import DryRun, largest_micro_batch

GIB = 2**30
COPIES = 5
"""float32 tensors of a classifier's size on a rank: theta, the traced graph's copy, the bucket of G, residual and direction."""
MARGIN = 0.2
"""Share of the memory that is left alone: kernels' workspaces, fragmentation, the libraries."""
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(world: World) -> float:
    """Memory that this rank may take: free on its GPU, or its part of what is free on the node and in its control group."""
    if world.device.type == "cuda":
        return float(torch.cuda.mem_get_info(world.device)[0])
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024.0 * int(facts["MemAvailable"].split()[0])
    try:  # a batch system's limit
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = min(free, float("inf") if limit == "max" else float(limit) - float(used))
    except OSError:
        pass
    return max(0.0, free) / world.launch.local_world_size


def check_classifiers(bundles: list[Bundle], mesh: Mesh, free: float) -> None:
    """Refuse classifiers whose KKT sums alone do not fit on this rank.

    Raises:
        C2GError: more classifiers than the ranks can hold.
    """
    needed = COPIES * sum(4 * p.numel() for k in mesh.mine for p in bundles[k].parameters.values())
    if needed > free * (1 - MARGIN):
        raise C2GError(
            f"{len(mesh.mine)} classifiers per process need {needed / GIB:.2f} GiB for their KKT sums,"
            f" {free * (1 - MARGIN) / GIB:.2f} GiB are there",
            f"start more processes, so that distributed.groups={mesh.groups} can grow, or train fewer classifiers at once",
        )


def largest_that_fits(bundles: list[Bundle], config: TrainConfig, mesh: Mesh, free: float) -> int:
    """``micro_batch=auto``: the largest for which the costliest classifier's micro-batch fits on every rank; collective.

    Raises:
        C2GError: not even one sample fits.
    """
    share = -(-config.global_batch // mesh.data.size)
    room, fitting = free * (1 - MARGIN), []
    for k in mesh.mine:
        dry = DryRun(bundles[k], config)
        fitting.append(largest_micro_batch(lambda b, dry=dry: dry.working_bytes(b, b == share), room, share))  # type: ignore[misc]
    sizes = torch.zeros(mesh.world.size, dtype=torch.float64, device=mesh.world.device)
    sizes[mesh.world.rank] = min(fitting)
    mesh.world.sum([sizes])
    if not bool((sizes > 0).all()):
        raise C2GError(
            f"micro_batch=auto: not one sample fits into {room / GIB:.2f} GiB of rank {int(sizes.argmin())}",
            "take a smaller generator or classifier, or processes with more memory",
        )
    return int(sizes.min())
