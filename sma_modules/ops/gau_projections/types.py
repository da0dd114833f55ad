"""What :func:`~sma_modules.ops.gau_projections.gau_projections` multiplies with, and what it gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """Those of the skip path ``(D', D)`` and of the unit ``(z + 2h, D)``, each with a bias."""

    skip: Tensor
    skip_bias: Tensor
    mx: Tensor
    mx_bias: Tensor


class Projections(NamedTuple):
    """``skip (S, D)``, and queries, keys ``(S, z)``, values and gate ``(S, h)``.

    All but the skip are undefined in slots that are not active.
    """

    skip: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    r: Tensor


class Signature(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    weights: tuple[torch.dtype, ...]
    empty: bool
