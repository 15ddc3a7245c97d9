"""Typed settings of a data set: its name, sizes and choice of samples."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_c2g.errors import UserError

EMBEDDED = ("digits", "breast_cancer", "wine")
"""Read from the scikit-learn package."""

TOYS = ("blobs", "moons", "spirals")
"""Synthetic points of the plane, drawn from the seed."""

ON_DISK = ("mnist", "cifar10", "celeba")
"""Read from ``root``; never downloaded, never written to."""

NAMES = (*EMBEDDED, *TOYS, *ON_DISK)


@dataclass
class DataConfig:
    """Settings of ``load_split``.

    Attributes:
        name: One of ``NAMES``.
        root: Folder with the data sets on disk; ignored by the embedded ones and the toys.
        train_size: Number of samples of the train part, equally many per class (the first classes take a remainder);
            None: everything but the held-out part, in its natural class proportions (not for the toys, which have
            no end).
        held_out_size: Number of samples of the held-out part, as balanced as the data allow. None: all samples that are not in
            the train part (a fifth if ``train_size`` is None too) for the embedded ones; the whole test file for
            mnist and cifar10; at most 1000 images for celeba; 1000 points for the toys.
        classes: Classes to keep, relabeled 0.. in the order given; None keeps all.
        image_size: Side of the square images (celeba only).
        attribute: Attribute of the second class (celeba only).
        seed: Seed of the choice of samples (of the points, for the toys).

    Raises:
        UserError: a field is out of its range.
    """

    name: str = "digits"
    root: str = "data"
    train_size: int | None = 100
    held_out_size: int | None = None
    classes: list[int] | None = None
    image_size: int = 32
    attribute: str = "Male"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"data.name={self.name!r} is unknown", f"choose one of {', '.join(NAMES)}")
        for field, size in (("train_size", self.train_size), ("held_out_size", self.held_out_size)):
            if size is not None and size < 1:
                raise UserError(f"data.{field}={size} is too small", f"give data.{field} >= 1, or null")
        if self.image_size < 1:
            raise UserError(f"data.image_size={self.image_size} is too small", "give data.image_size >= 1")
        if self.seed < 0:
            raise UserError(f"data.seed={self.seed} is negative", "give data.seed >= 0")
        if self.train_size is None and self.name in TOYS:
            raise UserError(
                f"data.train_size=null has no meaning for {self.name}, which can be drawn without end",
                "give a number, such as data.train_size=100",
            )
        if self.classes is not None:
            self._check_classes(list(self.classes))

    def _check_classes(self, classes: list[int]) -> None:
        if len(classes) < 2:
            raise UserError(
                f"data.classes={classes} leaves nothing to classify", "give at least two classes, or null for all"
            )
        if len(set(classes)) < len(classes):
            raise UserError(f"data.classes={classes} names a class twice", "name every class once")
        if min(classes) < 0:
            raise UserError(f"data.classes={classes} has a negative entry", "number the classes from 0")
