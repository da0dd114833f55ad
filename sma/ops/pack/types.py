"""What :func:`~sma.ops.pack.pack` returns, and what the choice of its backend depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """Where the True entries of a mask ``(B, L)`` are.

    Attributes:
        tokens: ``(K,)`` int64, ascending: flat positions ``b * L + t``. With a capacity K is that, and rows without a
            token hold ``B * L``.
        cu_seqlens: ``(B + 1,)`` int64: sequence b owns rows ``cu_seqlens[b]:cu_seqlens[b + 1]``. With a capacity
            ``(B + 2,)``: rows without a token make up one more sequence.
        row: ``(B * L,)`` int32: the row of each token, -1 where it has none.
        position: ``(K,)`` int64: ``position[tokens]``, 0 in rows without a token.
        kept: ``(B, L)`` bool: tokens that have a row; the mask itself without a capacity.
        overflow: ``()`` int64: tokens that were dropped for lack of capacity; None without a capacity.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    row: Tensor
    position: Tensor
    kept: Tensor
    overflow: Tensor | None


class Signature(NamedTuple):
    """Of the mask; ``empty`` says that it has no entries."""

    device: torch.device
    empty: bool
