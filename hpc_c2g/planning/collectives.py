"""Seconds of collectives over a cluster (pure functions). n is a number of ranks or nodes, b bytes, B bytes per second, l seconds."""

from __future__ import annotations

import math

from hpc_c2g.planning.hardware import HardwareSpec


def ring_seconds(nbytes: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Ring all-reduce: 2 (n - 1)/n b / B + 2 (n - 1) l, every byte sent twice in 2 (n - 1) consecutive messages."""
    if ranks < 2:
        return 0.0
    return 2 * (ranks - 1) / ranks * nbytes / bandwidth + 2 * (ranks - 1) * latency


def tree_seconds(nbytes: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Double binary tree all-reduce: 2 b / B + 2 ceil(log2 n) l, reduce and broadcast with pipelined messages."""
    if ranks < 2:
        return 0.0
    return 2 * nbytes / bandwidth + 2 * math.ceil(math.log2(ranks)) * latency


def all_reduce_seconds(nbytes: float, nodes: int, hardware: HardwareSpec) -> float:
    """Hierarchical all-reduce of b bytes over ``nodes`` nodes of g ranks.

    Within a node a ring over the g ranks (its reduce-scatter before, its all-gather after the exchange between nodes):
    ring(b, g, B_intra, l_intra). Between nodes each rank exchanges its b / g bytes at its g-th part of the node's bandwidth, which
    is b bytes at all of it, by the faster of two algorithms: min(ring, tree)(b, N, B_inter, l_inter).
    """
    intra = ring_seconds(nbytes, hardware.ranks_per_node, hardware.intra_gb_per_s * 1e9, hardware.intra_us * 1e-6)
    link = (hardware.inter_gb_per_s * 1e9, hardware.inter_us * 1e-6)
    return intra + min(ring_seconds(nbytes, nodes, *link), tree_seconds(nbytes, nodes, *link))


def algorithm(nbytes: float, nodes: int, hardware: HardwareSpec) -> str:
    """Name of the faster all-reduce between nodes: ``ring`` or ``tree``."""
    link = (hardware.inter_gb_per_s * 1e9, hardware.inter_us * 1e-6)
    return "ring" if ring_seconds(nbytes, nodes, *link) <= tree_seconds(nbytes, nodes, *link) else "tree"


def generator_seconds(
    nbytes: float, stage: int, micro_batches: int, forwards: int, nodes: int, hardware: HardwareSpec
) -> float:
    """Communication of the generator per step, with a the all-reduce of its b bytes; scattering or gathering alone takes a / 2.

    Stages 0 and 1: a (stage 1 scatters gradients and gathers weights). Stage 2 scatters at every one of m backwards:
    (m + 1) a / 2. Stage 3 also gathers the weights in every forward and backward: (f + 2 m) a / 2, f forwards.
    """
    a = all_reduce_seconds(nbytes, nodes, hardware)
    if stage < 2:
        return a
    return (micro_batches + 1) * a / 2 if stage == 2 else (forwards + 2 * micro_batches) * a / 2
