"""What the choice of a backend of :func:`~sma.ops.narrow_linear.narrow_linear` depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch

WIDEST = 8
"""Up to this many outputs the kernel reads its input once; more are faster as a matrix product."""


class Signature(NamedTuple):
    """Of the input and the weight; ``empty`` says that there is nothing to compute."""

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    outputs: int
    empty: bool
