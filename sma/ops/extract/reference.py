"""The definition of extract, token by token."""

import torch
from torch import Tensor

from sma.ops.packed import Packed


def extract(h: Tensor, packed: Packed) -> Tensor:
    """For every position its row, or zeros."""
    batch, length = packed.shape
    row_of = {flat: row for row, flat in enumerate(packed.index.tolist())}
    zero = h.new_zeros(h.shape[1:])
    rows = [h[row_of[flat]] if flat in row_of else zero for flat in range(batch * length)]
    flat_out = torch.stack(rows) if rows else h.new_zeros(0, *h.shape[1:])
    # The sum of no rows keeps h in the autograd graph when nothing is active.
    return (flat_out + h[:0].sum(0)).reshape(batch, length, *h.shape[1:])
