"""combine with the operations of PyTorch, one after the other."""

from torch import Tensor
from torch.nn import functional as F

from sma.dropout import dropout
from sma.ops.combine import OP, Plan, leading
from sma.ops.extract import extract
from sma.ops.row_norm import RowNorm
from sma.ops.row_norm.eager import row_norm
from sma.routing import Packed


@OP.backend("eager")
def combine(
    h: Tensor,
    packed: Packed,
    weight: Tensor | None,
    skip: Tensor | None,
    skip_bias: Tensor | None,
    residual: Tensor | None,
    norm: RowNorm | None,
    plan: Plan,
) -> Tensor:
    """Weigh the rows, put them back, add, activate, normalise."""
    dtype = leading(h, skip, residual).dtype
    if weight is not None:
        rows = packed.index if not packed.fixed else packed.index.clamp(max=packed.row.numel() - 1)
        h = h * weight.reshape(-1).index_select(0, rows).to(h.dtype)[:, None]
    if not plan.drop_sum:
        h = dropout(h, plan.dropout)
    y = extract(h, packed)
    y = y if skip is None else skip + y
    y = y if skip_bias is None else y + skip_bias.to(y.dtype)
    if plan.drop_sum:
        y = dropout(y, plan.dropout)
    y = y if residual is None else y + residual
    y = F.silu(y) if plan.activation == "silu" else y
    return (y if norm is None else row_norm(y, norm)).to(dtype)
