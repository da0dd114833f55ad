"""What :func:`~sma.ops.row_norm.row_norm` computes, and what the choice of its backend depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WIDEST = 8192
"""A token is held by one program of the kernels, and more features do not fit its registers."""


class RowNorm(NamedTuple):
    """A normalisation over the features of each token, ``weight * x / sqrt(mean(x^2) + eps) + bias``.

    Attributes:
        centred: subtract the mean first (layer norm).
        eps: added to the mean square.
        weight: ``(D,)``, ``(1,)`` or None.
        bias: ``(D,)`` or None.
    """

    centred: bool
    eps: float
    weight: Tensor | None
    bias: Tensor | None


class Signature(NamedTuple):
    """Of the tokens; ``empty`` says that there is nothing to compute."""

    device: torch.device
    dtype: torch.dtype
    width: int
    empty: bool
