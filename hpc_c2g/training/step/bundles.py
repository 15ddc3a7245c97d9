"""A run's classifier bundles, and quantities computed from them or from their copies in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_c2g.classifiers.bundle import Bundle, load_bundle
from hpc_c2g.errors import UserError
from hpc_c2g.generators.trained import Member


def load_bundles(folders: Sequence[str]) -> list[Bundle]:
    """Return the classifiers of one generator's members; a folder that is named more than once is read once.

    Raises:
        UserError: A bundle cannot be read, or they take inputs of different shapes.
    """
    read = {folder: load_bundle(folder) for folder in dict.fromkeys(folders)}
    bundles = [read[folder] for folder in folders]
    if len({bundle.input_shape for bundle in bundles}) > 1:
        shapes = ", ".join(f"{folder} {list(bundle.input_shape)}" for folder, bundle in read.items())
        raise UserError(
            f"the classifiers take inputs of different shapes: {shapes}",
            "one generator makes one shape: train the others in separate runs",
        )
    return bundles


def class_counts(classifiers: Sequence[Bundle | Member]) -> list[int]:
    """C_k."""
    return [len(classifier.classes) for classifier in classifiers]


def boxes(classifiers: Sequence[Bundle | Member]) -> tuple[Tensor, Tensor]:
    """Return lower and upper bounds of each classifier's normalized inputs, ``[K, *S]`` each."""
    bounds = [classifier.normalization.box() for classifier in classifiers]
    return torch.stack([b[0].float() for b in bounds]), torch.stack([b[1].float() for b in bounds])
