"""What makes queries and keys in :func:`~sma_modules.ops.gau_inputs.gau_inputs`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """Two affine maps and a rotation.

    Attributes:
        gamma: ``(2, z)`` factors of queries and keys.
        beta: ``(2, z)`` summands.
        position: ``(K,)`` int64 original positions; None for no rotation.
        theta: the base of the wavelengths.
    """

    gamma: Tensor
    beta: Tensor
    position: Tensor | None
    theta: float


class Signature(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    z: int
