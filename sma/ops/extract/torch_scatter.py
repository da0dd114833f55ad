"""extract through torch-scatter (extra ``scatter``), imported at the first use only."""

from torch import Tensor

from sma.ops.backend import scatter_applies, torch_scatter
from sma.ops.extract import OP
from sma.ops.extract.eager import extract as eager
from sma.ops.packed import Packed


@OP.backend("torch_scatter", priority=60, applies=lambda h, packed: scatter_applies(h, packed.fixed))
def extract(h: Tensor, packed: Packed) -> Tensor:
    """``segment_coo`` over a sorted index without repeats: a sum of at most one row each."""
    if h.numel() == 0:  # torch-scatter would divide by zero, which ends the process
        out: Tensor = eager(h, packed)
        return out
    batch, length = packed.shape
    flat: Tensor = torch_scatter().segment_coo(h, packed.index, dim_size=batch * length, reduce="sum")
    return flat.reshape(batch, length, *h.shape[1:])
