"""Common form of all data sets: labeled samples in two disjoint parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Labeled samples in raw units.

    Attributes:
        samples: float32 ``[n, *S]``; pixels in 0..1, features in their own units.
        labels: int64 ``[n]`` in 0..C-1.
        classes: Names of the C classes.
        value_range: Smallest and largest possible raw value ((0, 1) for pixels).
    """

    samples: Tensor
    labels: Tensor
    classes: list[str]
    value_range: tuple[float, float]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Dataset:
        """Select the samples ``indices``, in that order."""
        return replace(self, samples=self.samples[indices], labels=self.labels[indices])


def flat_rows(samples: Tensor) -> Tensor:
    """``[n, *S]`` to float64 ``[n, d]`` on the CPU."""
    return samples.detach().cpu().flatten(1).double()


@dataclass(frozen=True)
class Split:
    """Disjoint parts of one data set: the classifier's training part, and the held-out part."""

    train: Dataset
    held_out: Dataset
