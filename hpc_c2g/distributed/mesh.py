"""Device mesh of member groups x data ranks; a member is one solution of one classifier."""

from __future__ import annotations

import atexit
import functools
import math
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hpc_c2g.distributed.environment import LaunchEnvironment
from hpc_c2g.distributed.world import World
from hpc_c2g.errors import UserError

Group = Any
"""A torch process group."""


@dataclass(frozen=True)
class DataRanks:
    """Data-parallel ranks: they share the samples of each member of their group.

    Attributes:
        rank: Rank of this process among the data ranks.
        size: Number of data ranks.
        group: Process group of all data ranks; None for a single one.
        intra_node: Process group of the data ranks on this node; None if the sum is not hierarchical.
        inter_node: Process group of the data ranks with this local rank on every node; None if the sum is not hierarchical.
    """

    rank: int = 0
    size: int = 1
    group: Group | None = None
    intra_node: Group | None = None
    inter_node: Group | None = None


@dataclass(frozen=True)
class Mesh:
    """Ranks as ``groups`` x data ranks, group by group; group g works on members g K / groups .. (g + 1) K / groups.

    Attributes:
        world: All ranks of the job.
        members: K, the number of members: classifiers x solutions.
        groups: Number of groups of ranks.
        data: Data ranks of this process's group.
    """

    world: World
    members: int
    groups: int
    data: DataRanks

    @classmethod
    def over(cls, world: World, members: int, groups: int | None = None, hierarchical: bool = False) -> Mesh:
        """Build the mesh; collective.

        Args:
            world: All ranks of the job.
            members: K, the number of members.
            groups: Number of groups; None takes the greatest common divisor of ranks and members.
            hierarchical: Sum inside the node first, then across nodes.

        Raises:
            UserError: ``groups`` does not divide the ranks or the members.
        """
        groups = groups or math.gcd(world.size, members)
        for count, kind in ((members, "classifiers x solutions"), (world.size, "processes")):
            if count % groups:
                raise UserError(
                    f"distributed.groups={groups} does not divide the {count} {kind}",
                    f"give a common divisor of {members} classifiers x solutions and {world.size} processes, or null",
                )
        size = world.size // groups
        if size == 1:
            return cls(world, members, groups, DataRanks())
        flat = _device_mesh(world.launch, world.device.type, (groups, size), ("classifier", "data"))
        intra_node, inter_node = None, None
        local = math.gcd(size, *world.all_gather_object(world.launch.local_world_size))  # the same shape on every rank
        if hierarchical and 1 < local < size:
            shape = (groups, size // local, local)
            nested = _device_mesh(world.launch, world.device.type, shape, ("classifier", "node", "local"))
            intra_node, inter_node = nested.get_group("local"), nested.get_group("node")
        return cls(
            world,
            members,
            groups,
            DataRanks(world.rank % size, size, flat.get_group("data"), intra_node, inter_node),
        )

    @property
    def local_members(self) -> range:
        """Indices of the members that this rank works on."""
        each = self.members // self.groups
        group = self.world.rank // self.data.size
        return range(group * each, (group + 1) * each)


@functools.cache
def _device_mesh(launch: LaunchEnvironment, device: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Build once per process and shape; released before the process groups are destroyed at exit (``World.start``)."""
    atexit.register(_device_mesh.cache_clear)
    return init_device_mesh(device, shape, mesh_dim_names=names)
