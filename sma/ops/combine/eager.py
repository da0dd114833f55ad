"""combine with the operations of PyTorch, one after the other."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.dropout import add_dropout, dropout
from sma.ops.combine.types import Finish, Terms, leading
from sma.ops.extract import extract
from sma.ops.packed import Packed
from sma.ops.row_norm.eager import row_norm


def combine(h: Tensor, packed: Packed, terms: Terms, finish: Finish) -> Tensor:
    """Weigh the rows, put them back, add, activate, normalise."""
    weight, skip, skip_bias, residual = terms
    dtype = leading(h, terms).dtype
    if weight is not None:
        rows = packed.index if not packed.fixed else packed.index.clamp(max=packed.row.numel() - 1)
        h = h * weight.reshape(-1).index_select(0, rows).to(h.dtype)[:, None]
    if not finish.drop_sum:
        h = dropout(h, finish.dropout)
    if finish.drop_sum and residual is not None and skip is not None and skip_bias is None and _adds(h, packed, skip):
        y = add_dropout(skip, finish.dropout, residual, h, packed.index)
    else:
        y = _placed(h, packed, skip)
        y = y if skip_bias is None else y + skip_bias.to(y.dtype)
        y = dropout(y, finish.dropout) if finish.drop_sum else y
        y = y if residual is None else y + residual
    y = F.silu(y) if finish.activation == "silu" else y
    return (y if finish.norm is None else row_norm(y, finish.norm)).to(dtype)


def _placed(h: Tensor, packed: Packed, skip: Tensor | None) -> Tensor:
    """The rows at their places, on top of the skip: ``(B, L, D)``."""
    if skip is None or not _adds(h, packed, skip):
        y = extract(h, packed)
        return y if skip is None else skip + y
    # The rows are distinct: what is added to each is one number, in the same bits each time.
    return torch.index_add(skip.flatten(0, 1), 0, packed.index, h).view_as(skip)


def _adds(h: Tensor, packed: Packed, skip: Tensor) -> bool:
    """The rows can be added to those of the skip."""
    return not packed.fixed and not packed.whole and skip.dtype == h.dtype
