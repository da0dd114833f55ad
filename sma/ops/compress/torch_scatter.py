"""compress through torch-scatter (extra ``scatter``), imported at the first use only."""

from torch import Tensor

from sma.ops.backend import torch_scatter
from sma.ops.compress import eager
from sma.ops.packed import Packed


def compress(x: Tensor, packed: Packed) -> Tensor:
    """``gather_coo``: the index is sorted, as it needs."""
    if x.numel() == 0 or packed.index.numel() == 0:  # torch-scatter would divide by zero, which ends the process
        return eager.compress(x, packed)
    out: Tensor = torch_scatter().gather_coo(x.flatten(0, 1), packed.index)
    return out
