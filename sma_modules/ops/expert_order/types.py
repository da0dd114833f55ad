"""What :func:`~sma_modules.ops.expert_order.order_by_expert` gives, and what the choices of backends depend on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertOrder(NamedTuple):
    """The order in which T tokens, each going to k experts, are sorted by expert.

    Attributes:
        order: ``(T * k,)`` int64: sorted row r is entry ``order[r]`` of the flattened ``(T, k)`` choice.
        inverse: ``(T * k,)`` int64: entry e of the choice is sorted row ``inverse[e]``.
        counts: ``(E,)`` int64: rows of each expert.
        ends: ``(E,)`` int32: where the rows of each expert end, the running sum of ``counts``.
        top_k: k.
    """

    order: Tensor
    inverse: Tensor
    counts: Tensor
    ends: Tensor
    top_k: int


class OrderSignature(NamedTuple):
    """What the choice of a backend for the sorting depends on."""

    device: torch.device
    dtype: torch.dtype
    experts: int
    large: bool


class RowsSignature(NamedTuple):
    """What the choice of a backend for moving rows depends on; ``weight`` is None where rows are not weighted."""

    device: torch.device
    dtype: torch.dtype
    weight: torch.dtype | None
