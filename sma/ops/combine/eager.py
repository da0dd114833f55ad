"""combine with the operations of PyTorch, one after the other."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.dropout import add_dropout, dropout
from sma.ops.combine.types import Finish, Terms
from sma.ops.extract.eager import extract
from sma.ops.packed import Packed
from sma.ops.row_norm.eager import row_norm


def combine(h: Tensor, packed: Packed, terms: Terms, finish: Finish) -> Tensor:
    """Weigh the rows, put them back, add, activate, normalise."""
    weight, skip, skip_bias, residual = terms
    activation, norm, p, drop_sum = finish
    fixed = packed.overflow is not None
    dtype = (residual if residual is not None else skip if skip is not None else h).dtype
    if weight is not None:
        rows = packed.index.clamp(max=packed.row.numel() - 1) if fixed else packed.index
        h = h * weight.reshape(-1).index_select(0, rows).to(h.dtype)[:, None]
    if p and not drop_sum:
        h = dropout(h, p)
    # The rows are distinct: what is added to each is one number, in the same bits each time.
    if skip is None or fixed or packed.whole or skip.dtype != h.dtype:
        y = extract(h, packed)
        y = y if skip is None else skip + y
    elif drop_sum and residual is not None and skip_bias is None:
        y, p, residual = add_dropout(skip, p, residual, h, packed.index), 0.0, None
    else:
        y = torch.index_add(skip.flatten(0, 1), 0, packed.index, h).view_as(skip)
    y = y if skip_bias is None else y + skip_bias.to(y.dtype)
    if p and drop_sum:
        y = dropout(y, p)
    y = y if residual is None else y + residual
    y = F.silu(y) if activation == "silu" else y
    return (y if norm is None else row_norm(y, norm)).to(dtype)
