"""Assignment of the global batch's samples to classifiers, ranks and micro-batches: a function of sample indices alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hpc_c2g.distributed.mesh import Mesh
from hpc_c2g.errors import UserError
from hpc_c2g.training.config.train import TrainConfig

SampleRange = tuple[int, int]


@dataclass(frozen=True)
class Sharding:
    """Part of the work on one rank.

    Attributes:
        batches: Samples B_k of the global batch for each classifier; they do not depend on the ranks.
        pieces: Micro-batches of each of this rank's classifiers, as ranges within the classifier's batch.
        one_pass: True if the whole part is held at once, so that its graph is kept and nothing is recomputed; the same on every rank.
    """

    batches: list[int]
    micro_batches: dict[int, list[SampleRange]]
    one_pass: bool

    @property
    def micro_batch_count(self) -> int:
        """Return the number of this rank's micro-batches; the same on every rank, because ZeRO communicates within each."""
        return sum(map(len, self.micro_batches.values()))


def batch_shares(config: TrainConfig, classes: Sequence[int]) -> list[int]:
    """Return B_k: ``global_batch`` in whole samples in proportion to ``shares``, or to the classes; largest remainders are rounded up.

    Raises:
        UserError: A classifier would get no sample.
    """
    shares: Sequence[float] = [share for share in config.shares for _ in range(config.solutions)] or classes
    global_batch = config.global_batch
    exact = [global_batch * share / sum(shares) for share in shares]
    batches = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: batches[k] - exact[k])
    for k in by_remainder[: global_batch - sum(batches)]:
        batches[k] += 1
    if min(batches) < 1:
        raise UserError(
            f"global_batch={global_batch} with shares {config.shares or list(classes)} gives classifier"
            f" {batches.index(0) // config.solutions} no sample",
            "give a larger global_batch or other shares",
        )
    return batches


def shard(config: TrainConfig, classes: Sequence[int], mesh: Mesh, micro_batch: int | None) -> Sharding:
    """Return this rank's part of the work.

    Args:
        config: Settings of the run.
        classes: Classes C_k; without ``config.shares`` a classifier's share of the batch is in proportion to its classes.
        mesh: Mesh of the ranks.
        micro_batch: Samples whose graph is held at once, None for no limit.

    Raises:
        UserError: A classifier or a rank would be left without samples.
    """
    if config.shares and len(config.shares) * config.solutions != len(classes):
        raise UserError(
            f"shares={config.shares} names {len(config.shares)} shares for {len(classes) // config.solutions} classifiers",
            "give one share per classifier",
        )
    batches = batch_shares(config, classes)
    data, each = mesh.data, mesh.members // mesh.groups
    if config.deterministic:
        if config.deterministic_shards % data.size or mesh.groups > 1:
            raise UserError(
                f"deterministic_shards={config.deterministic_shards} cannot be shared by {data.size} processes"
                f" in {mesh.groups} groups of classifiers",
                "deterministic=true needs deterministic_shards that the processes divide, and distributed.groups=1",
            )
        counts = dict.fromkeys(mesh.local_members, config.deterministic_shards // data.size)
    else:
        size = micro_batch or config.global_batch
        needed = [-(-_largest(batch, data.size) // size) for batch in batches]
        # groups may have classifiers of their own: each rank must still run as many micro-batches as any other
        counts = {k: min(needed[k], max(1, batches[k] // data.size)) for k in mesh.local_members}
        if mesh.groups > 1:
            counts = dict.fromkeys(mesh.local_members, max(needed))
    for k, batch in enumerate(batches):  # of every classifier, so that every rank refuses
        _check(k // config.solutions, batch, data.size, counts.get(k, max(counts.values())))
    micro_batches = {k: _slices(batches[k], data.rank, data.size, count) for k, count in counts.items()}
    held = max(sum(_largest(b, data.size) for b in batches[g : g + each]) for g in range(0, len(batches), each))
    one_pass = all(count == 1 for count in counts.values()) and held <= (micro_batch or held)
    one_pass = one_pass and not config.deterministic  # a rank with one shard must do what a rank with several does
    return Sharding(batches, micro_batches, one_pass)


def check_coupled(config: TrainConfig, sharding: Sharding) -> None:
    """Refuse settings that batch statistics, which couple the samples of a classifier's batch, do not allow.

    Raises:
        UserError: Sums are deterministic, or a batch has one sample.
    """
    chosen = f"stationarity.statistics={config.stationarity.statistics}"
    if config.deterministic:
        raise UserError(
            f"deterministic=true is not possible with a BatchNorm's batch statistics ({chosen}): their sums are in no fixed tree",
            "give deterministic=false, or stationarity.statistics=frozen",
        )
    if min(sharding.batches) < 2:
        raise UserError(
            f"global_batch={config.global_batch} gives a classifier one sample, without variance for its BatchNorm ({chosen})",
            "give a larger global_batch, or stationarity.statistics=frozen",
        )


def _largest(batch: int, ranks: int) -> int:
    """Return the largest rank's share of a batch."""
    return -(-batch // ranks)


def _check(classifier: int, batch: int, ranks: int, count: int) -> None:
    if batch < ranks * count:
        raise UserError(
            f"global_batch gives classifier {classifier} {batch} samples for {ranks * count} micro-batches"
            f" ({ranks} ranks x {count})",
            "give a larger global_batch, other shares, a larger micro_batch, or fewer ranks",
        )


def _slices(batch: int, rank: int, ranks: int, count: int) -> list[SampleRange]:
    """Return ``count`` ranges of rank ``rank``: the same edges as with one rank, if the numbers divide."""
    whole = ranks * count
    edges = [batch * i // whole for i in range(rank * count, (rank + 1) * count + 1)]
    return list(itertools.pairwise(edges))
