"""The definition of compress, token by token."""

import torch
from torch import Tensor

from sma.ops.packed import Packed


def compress(x: Tensor, packed: Packed) -> Tensor:
    """Walk over the active tokens and copy each."""
    batch, length = packed.shape
    nothing = x.reshape(batch * length, *x.shape[2:])[:0]
    rows = [
        x[flat // length, flat % length] if flat < batch * length else nothing.sum(0) for flat in packed.index.tolist()
    ]
    return torch.stack(rows) if rows else nothing
