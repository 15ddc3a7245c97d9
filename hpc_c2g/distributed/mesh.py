"""Which ranks work on which classifiers, and who adds up what with whom: a mesh of classifier groups x data ranks."""

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
    """The ranks that share each of a group's classifiers by samples.

    Attributes:
        rank: of this process among them.
        size: their number.
        group: all of them; None where there is one.
        inside: those on this node, None where the sum is not hierarchical.
        across: those at this process's place on every node, None where the sum is not hierarchical.
    """

    rank: int = 0
    size: int = 1
    group: Group | None = None
    intra_node: Group | None = None
    inter_node: Group | None = None


@dataclass(frozen=True)
class Mesh:
    """Ranks as ``groups`` x data ranks, group by group; group g works on classifiers g K / groups .. (g + 1) K / groups.

    Attributes:
        world: all ranks.
        members: K, every solution of every classifier counted.
        groups: of ranks.
        data: the ranks of this process's group.
    """

    world: World
    members: int
    groups: int
    data: DataRanks

    @classmethod
    def over(cls, world: World, classifiers: int, groups: int | None = None, hierarchical: bool = False) -> Mesh:
        """Lay out the ranks; collective.

        Args:
            world: all ranks.
            classifiers: K, each counted once for every solution.
            groups: None takes as many as divide both ranks and classifiers.
            hierarchical: sum inside the node first, then across nodes.

        Raises:
            UserError: the ranks or the classifiers cannot be shared by the groups.
        """
        groups = groups or math.gcd(world.size, classifiers)
        for count, what in ((classifiers, "classifiers x solutions"), (world.size, "processes")):
            if count % groups:
                raise UserError(
                    f"distributed.groups={groups} does not divide the {count} {what}",
                    f"give a common divisor of {classifiers} classifiers x solutions and {world.size} processes, or null",
                )
        size = world.size // groups
        if size == 1:
            return cls(world, classifiers, groups, DataRanks())
        flat = _device_mesh(world.launch, world.device.type, (groups, size), ("classifier", "data"))
        intra_node, inter_node = None, None
        local = math.gcd(size, *world.all_gather_object(world.launch.local_world_size))  # the same shape on every rank
        if hierarchical and 1 < local < size:
            shape = (groups, size // local, local)
            nested = _device_mesh(world.launch, world.device.type, shape, ("classifier", "node", "local"))
            intra_node, inter_node = nested.get_group("local"), nested.get_group("node")
        return cls(
            world,
            classifiers,
            groups,
            DataRanks(world.rank % size, size, flat.get_group("data"), intra_node, inter_node),
        )

    @property
    def local_members(self) -> range:
        """Indices of the classifiers that this rank works on."""
        each = self.members // self.groups
        group = self.world.rank // self.data.size
        return range(group * each, (group + 1) * each)


@functools.cache
def _device_mesh(launch: LaunchEnvironment, device: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Made once per process and shape, and let go of before the process groups are destroyed at exit (``World.start``)."""
    atexit.register(_device_mesh.cache_clear)
    return init_device_mesh(device, shape, mesh_dim_names=names)
