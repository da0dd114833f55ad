"""The definition of compress, token by token."""

import torch
from torch import Tensor

from sma.ops.compress import OP
from sma.routing import Packed


@OP.backend("reference", priority=90)
def compress(x: Tensor, packed: Packed) -> Tensor:
    """Walk over the active tokens and copy each."""
    batch, length = packed.shape
    rows = [x[flat // length, flat % length] for flat in packed.index.tolist()]
    return torch.stack(rows) if rows else x.reshape(batch * length, *x.shape[2:])[:0]
