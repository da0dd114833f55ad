"""extract through torch-scatter (extra ``scatter``), imported at the first use only."""

from torch import Tensor

from sma.ops.backend import torch_scatter
from sma.ops.extract import eager
from sma.ops.packed import Packed


def extract(h: Tensor, packed: Packed) -> Tensor:
    """``segment_coo`` over a sorted index without repeats: a sum of at most one row each."""
    if h.numel() == 0:  # torch-scatter would divide by zero, which ends the process
        return eager.extract(h, packed)
    batch, length = packed.shape
    flat: Tensor = torch_scatter().segment_coo(h, packed.index, dim_size=batch * length, reduce="sum")
    return flat.reshape(batch, length, *h.shape[1:])
