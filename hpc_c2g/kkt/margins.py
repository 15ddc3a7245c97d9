"""Pairwise margins m_ij = Phi_{y_i}(x_i) - Phi_j(x_i), j != y_i."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """m_ij for every class j, zero at j = y_i.

    Args:
        logits: Phi(x), ``[B, C]``.
        labels: y, int64 ``[B]``.

    Returns:
        ``[B, C]``.
    """
    return logits.gather(1, labels[:, None]) - logits


def other_classes(labels: Tensor, classes: int) -> Tensor:
    """The mask j != y_i, bool ``[B, C]``."""
    return labels[:, None] != torch.arange(classes, device=labels.device)


def smallest_margins(margins: Tensor, labels: Tensor) -> Tensor:
    """min over j != y_i of m_ij, ``[B]``."""
    return margins.masked_fill(~other_classes(labels, margins.shape[1]), torch.inf).amin(1)
