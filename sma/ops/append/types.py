"""What :func:`~sma.ops.append.append` returns, and what the choice of its backend depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AppendedRows(NamedTuple):
    """What is remembered together with new tokens.

    Attributes:
        both: per kind of row ``(K', ...)``, sequences one after the other, each with what it remembered in front.
        after: per kind of row ``(B, capacity, ...)``: the last rows of each sequence, zeros in front of fewer.
        cu_seqlens: ``(B + 1,)`` int64: sequence b owns ``both[cu_seqlens[b]:cu_seqlens[b + 1]]``. One entry more with a
            fixed number of new rows, as in :class:`~sma.ops.packed.Packed`.
        start: ``(B,)`` int64: how many rows of each stream came before its first one in ``both``. One entry more with a
            fixed number of new rows, 0.
        counts: ``(B,)`` int64: how many rows each stream has had in all.
    """

    both: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    cu_seqlens: Tensor
    start: Tensor
    counts: Tensor


class Signature(NamedTuple):
    """Of the rows; ``differentiated`` says that one of them needs a gradient."""

    device: torch.device
    differentiated: bool
