"""Load a data set by name, split into train and held-out part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hpc_c2g.data.celeba import load_celeba
from hpc_c2g.data.config import TOYS, DataConfig
from hpc_c2g.data.dataset import Split
from hpc_c2g.data.embedded import load_digits, load_table
from hpc_c2g.data.images import load_cifar10, load_mnist
from hpc_c2g.data.toys import load_toy

LOADERS: dict[str, Callable[[DataConfig], Split]] = {
    "digits": load_digits,
    "breast_cancer": load_table,
    "wine": load_table,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "celeba": load_celeba,
    **dict.fromkeys(TOYS, load_toy),
}


def load_split(config: DataConfig) -> Split:
    """Load the disjoint train and held-out parts of ``config.name``, deterministic in ``config``.

    The samples of a part come in the order of the data set (the toys' by class), not shuffled.

    Raises:
        UserError: a field is out of its range, files are missing or damaged, or more samples are requested than exist.
    """
    # A config may have been changed since it was made: a copy is checked again.
    checked = replace(config)
    return LOADERS[checked.name](checked)
