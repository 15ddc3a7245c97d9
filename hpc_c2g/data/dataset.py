"""What every data set is turned into."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Labeled samples in raw units.

    Attributes:
        samples: float32 ``[n, *S]``; pixels in 0..1, features in their own units.
        labels: int64 ``[n]`` in 0..C-1.
        classes: the C names.
        value_range: smallest and largest raw value that can occur (for pixels (0, 1)).
    """

    samples: Tensor
    labels: Tensor
    classes: list[str]
    value_range: tuple[float, float]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Dataset:
        """The samples ``indices``, in their order."""
        return replace(self, samples=self.samples[indices], labels=self.labels[indices])


def flat_rows(samples: Tensor) -> Tensor:
    """``[n, *S]`` to float64 ``[n, d]`` on the CPU."""
    return samples.detach().cpu().flatten(1).double()


@dataclass(frozen=True)
class Split:
    """Disjoint parts of one data set: what the classifier is fitted to, and what it never sees."""

    train: Dataset
    held_out: Dataset
