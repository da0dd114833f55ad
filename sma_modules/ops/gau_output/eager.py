"""The output by PyTorch's own functions."""

from torch import Tensor
from torch.nn import functional as F

from sma.ops.backend import concrete
from sma_modules.ops.gau_output import OP


@OP.backend("eager")
def gau_output_eager(
    x: Tensor, weight: Tensor, bias: Tensor, active: Tensor, confidence: Tensor, skip: Tensor, residual: Tensor
) -> Tensor:
    """On a CPU rows that are not active are left out of the product."""
    total = skip + residual
    if not concrete(active) or bool(active.all()):
        y = F.linear(x, weight, bias) * confidence[:, None].to(x.dtype)
        return F.silu(total + y.masked_fill(~active[:, None], 0)).to(residual.dtype)
    rows = active.nonzero().squeeze(1)
    y = F.linear(x.index_select(0, rows), weight, bias) * confidence[rows, None].to(x.dtype)
    return F.silu(total.index_add(0, rows, y.to(total.dtype))).to(residual.dtype)
