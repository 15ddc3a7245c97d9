"""Random choice of the samples of each part, balanced over the classes and keyed by the seed.

Every class has one random order. The train part takes from its front and the held-out part, where both come from one
pool, from its end: the train part does not depend on the held-out size, and a larger train part contains a smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hpc_c2g.data.config import DataConfig
from hpc_c2g.errors import UserError

Indices = NDArray[np.int64]

TRAIN, HELD_OUT = 0, 1
"""Streams of random numbers, beside the seed and the class."""


def even_shares(size: int, count: int) -> list[int]:
    """Spread ``size`` over ``count`` classes; the first ones take the remainder."""
    return [size // count + (i < size % count) for i in range(count)]


def filled_shares(size: int, available: Sequence[int]) -> list[int]:
    """Spread ``size`` as evenly as possible with at most ``available[c]`` of class c; needs ``size <= sum(available)``."""
    level = 0
    while level < max(available) and sum(min(most, level + 1) for most in available) <= size:
        level += 1
    shares = [min(most, level) for most in available]
    unfilled = [c for c, most in enumerate(available) if most > level]
    for c in unfilled[: size - sum(shares)]:
        shares[c] += 1
    return shares


def balanced_train_shares(config: DataConfig, names: Sequence[str]) -> list[int]:
    """Number of samples per class of the train part; ``config.train_size`` must not be None.

    Raises:
        UserError: fewer samples than classes.
    """
    assert config.train_size is not None
    if config.train_size < len(names):
        raise UserError(
            f"data.train_size={config.train_size} leaves some of the {len(names)} classes of {config.name} empty",
            f"give data.train_size >= {len(names)}, or fewer data.classes",
        )
    return even_shares(config.train_size, len(names))


def relabel(labels: Indices, names: Sequence[str], config: DataConfig) -> tuple[Indices, list[str]]:
    """Keep ``config.classes``: labels 0.. in the order given, -1 for what is dropped; and the names that remain.

    Raises:
        UserError: a class that the data set does not have.
    """
    if config.classes is None:
        return labels, list(names)
    kept = list(config.classes)
    if max(kept) >= len(names):
        raise UserError(
            f"data.classes={kept} names class {max(kept)}, but {config.name} has {len(names)} classes",
            f"choose from 0..{len(names) - 1}: {', '.join(names)}",
        )
    table = np.full(len(names), -1, dtype=np.int64)
    table[kept] = np.arange(len(kept))
    return table[labels], [names[c] for c in kept]


def split_pool(labels: Indices, names: Sequence[str], config: DataConfig) -> tuple[Indices, Indices]:
    """Split one pool into train and held-out part.

    Args:
        labels: ``[n]`` in 0..C-1, or -1 for samples that belong to no class.
        names: the C names.
        config: sizes and seed.

    Returns:
        Two disjoint ascending arrays of indices into ``labels``.

    Raises:
        UserError: a size exceeds the available samples.
    """
    orders = _orders(labels, len(names), config.seed, TRAIN)
    counts = [len(order) for order in orders]
    if config.train_size is not None:
        shares = _train_shares(counts, names, config)
        left = [count - share for count, share in zip(counts, shares, strict=True)]
        held = _held_shares(left, config, default=sum(left))
    else:
        held = _held_shares(counts, config, default=max(1, sum(counts) // 5))
        shares = _all_shares([count - share for count, share in zip(counts, held, strict=True)], names, config)
    train = [order[:share] for order, share in zip(orders, shares, strict=True)]
    kept_back = [order[len(order) - share :] for order, share in zip(orders, held, strict=True)]
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(kept_back))


def split_files(
    train_labels: Indices,
    held_labels: Indices,
    names: Sequence[str],
    config: DataConfig,
    most_held_out: int | None = None,
) -> tuple[Indices, Indices]:
    """Choose train and held-out part from the two files of a data set, like ``split_pool`` from one.

    Args:
        train_labels: ``[n]`` in 0..C-1, or -1 for samples that belong to no class.
        held_labels: ``[m]``, likewise.
        names: the C names.
        config: sizes and seed.
        most_held_out: size of the held-out part where ``config.held_out_size`` is None; None for all.

    Returns:
        Ascending indices into ``train_labels`` and into ``held_labels``.

    Raises:
        UserError: a size exceeds the available samples.
    """
    train_orders = _orders(train_labels, len(names), config.seed, TRAIN)
    held_orders = _orders(held_labels, len(names), config.seed, HELD_OUT)
    counts, held_counts = ([len(order) for order in orders] for orders in (train_orders, held_orders))
    shares = (_all_shares if config.train_size is None else _train_shares)(counts, names, config)
    default = sum(held_counts) if most_held_out is None else min(most_held_out, sum(held_counts))
    held = _held_shares(held_counts, config, default)
    train = [order[:share] for order, share in zip(train_orders, shares, strict=True)]
    kept_back = [order[:share] for order, share in zip(held_orders, held, strict=True)]
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(kept_back))


def _orders(labels: Indices, classes: int, seed: int, stream: int) -> list[Indices]:
    """Indices of each class in random order."""
    return [np.random.default_rng([seed, stream, c]).permutation(np.flatnonzero(labels == c)) for c in range(classes)]


def _train_shares(counts: Sequence[int], names: Sequence[str], config: DataConfig) -> list[int]:
    shares = balanced_train_shares(config, names)
    for share, count, name in zip(shares, counts, names, strict=True):
        if share > count:
            raise UserError(
                f"data.train_size={config.train_size} needs {share} samples of class {name!r}, "
                f"but {config.name} has {count} to train on",
                f"give data.train_size <= {len(names) * min(counts)}, or null for all without balance",
            )
    return shares


def _all_shares(counts: Sequence[int], names: Sequence[str], config: DataConfig) -> list[int]:
    """Return all ``counts``, for ``train_size`` None.

    Raises:
        UserError: a class has no samples left.
    """
    if not all(counts):
        raise UserError(
            f"class {names[list(counts).index(0)]!r} of {config.name} has no samples left to train on",
            f"data.held_out_size is {config.held_out_size}: hold out fewer; or choose other data.classes",
        )
    return list(counts)


def _held_shares(counts: Sequence[int], config: DataConfig, default: int) -> list[int]:
    size = default if config.held_out_size is None else config.held_out_size
    if size < 1:
        raise UserError(
            f"data.train_size={config.train_size} uses all of {config.name}: nothing is held out to judge with",
            "give a smaller data.train_size",
        )
    if size > sum(counts):
        raise UserError(
            f"data.held_out_size={size} is more than the {sum(counts)} samples that {config.name} has to hold out",
            f"give data.held_out_size <= {sum(counts)}" if sum(counts) else "give a smaller data.train_size",
        )
    return filled_shares(size, counts)
