"""segment_sum through torch-scatter (extra ``scatter``), imported at the first use only."""

from torch import Tensor

from sma.ops.backend import scatter_applies, torch_scatter, wider
from sma.ops.segment_sum import OP


@OP.backend("torch_scatter", priority=60, applies=lambda x, cu_seqlens: scatter_applies(x, cu_seqlens))
def segment_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``segment_csr``, made for exactly this."""
    out: Tensor = torch_scatter().segment_csr(x.to(wider(x)), cu_seqlens, reduce="sum")
    return out.to(x.dtype)
