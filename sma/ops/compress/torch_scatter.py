"""compress through torch-scatter (extra ``scatter``), imported at the first use only."""

from torch import Tensor

from sma.ops.backend import scatter_applies, torch_scatter
from sma.ops.compress import OP
from sma.ops.compress.eager import compress as eager
from sma.ops.packed import Packed


@OP.backend("torch_scatter", priority=60, applies=lambda x, packed: scatter_applies(x, packed.fixed))
def compress(x: Tensor, packed: Packed) -> Tensor:
    """``gather_coo``: the index is sorted, as it needs."""
    if x.numel() == 0 or packed.index.numel() == 0:  # torch-scatter would divide by zero, which ends the process
        out: Tensor = eager(x, packed)
        return out
    out = torch_scatter().gather_coo(x.flatten(0, 1), packed.index)
    return out
