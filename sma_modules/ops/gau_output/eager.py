"""gau_output with the operations of PyTorch."""

from torch import Tensor
from torch.nn import functional as F

from sma.ops.backend import concrete
from sma_modules.ops.gau_output.types import Around, Attended


def gau_output(attended: Attended, around: Around) -> Tensor:
    """On a CPU rows that are not active are left out of the product."""
    (x, weight, bias), (active, confidence, skip, residual) = attended, around
    total = skip + residual
    if not concrete(active) or bool(active.all()):
        y = F.linear(x, weight, bias) * confidence[:, None].to(x.dtype)
        return F.silu(total + y.masked_fill(~active[:, None], 0)).to(residual.dtype)
    rows = active.nonzero().squeeze(1)
    y = F.linear(x.index_select(0, rows), weight, bias) * confidence[rows, None].to(x.dtype)
    return F.silu(total.index_add(0, rows, y.to(total.dtype))).to(residual.dtype)
