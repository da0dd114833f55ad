"""What :func:`~sma_modules.ops.gau_output.gau_output` multiplies and adds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Attended(NamedTuple):
    """``x (S, h)``, the gated output of attention, and its product's ``weight (D, h)`` and ``bias (D,)``."""

    x: Tensor
    weight: Tensor
    bias: Tensor


class Around(NamedTuple):
    """The other terms of the output: ``active (S,)``, ``confidence (S,)``, ``skip (S, D)`` and ``residual (S, D)``."""

    active: Tensor
    confidence: Tensor
    skip: Tensor
    residual: Tensor


class Signature(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    weight: torch.dtype
    empty: bool
