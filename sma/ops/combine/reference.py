"""The definition of combine, token by token."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.ops.combine.types import Finish, Terms, leading
from sma.ops.packed import Packed
from sma.ops.row_norm.reference import normalise


def combine(h: Tensor, packed: Packed, terms: Terms, finish: Finish) -> Tensor:
    """As it says: everything of one token after the other, in float32 at least."""
    weight, skip, skip_bias, residual = terms
    like = leading(h, terms)
    wide = torch.promote_types(like.dtype, torch.float32)
    batch, length = packed.shape
    tokens: list[Tensor] = []
    for b in range(batch):
        for t in range(length):
            row = int(packed.row[b * length + t])
            # The sum of no rows keeps h in the graph where nothing is active.
            value = h[row].to(wide) if row >= 0 else h[:0].sum(0).to(wide)
            if weight is not None:
                value = value * (weight[b, t].to(wide) if row >= 0 else weight[:0].sum().to(wide))
            if not finish.drop_sum:
                value = torch.dropout(value, finish.dropout, finish.dropout > 0)
            value = value if skip is None else value + skip[b, t].to(wide)
            value = value if skip_bias is None else value + skip_bias.to(wide)
            if finish.drop_sum:
                value = torch.dropout(value, finish.dropout, finish.dropout > 0)
            value = value if residual is None else value + residual[b, t].to(wide)
            value = F.silu(value) if finish.activation == "silu" else value
            tokens.append(value if finish.norm is None else normalise(value, finish.norm))
    out = torch.stack([*tokens, h.new_zeros(h.shape[1], dtype=wide) + h[:0].sum(0)])[:-1]
    return out.view(batch, length, h.shape[1]).to(like.dtype)
