"""narrow_linear as a matrix product."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.ops.narrow_linear import OP


@OP.backend("eager")
def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """A matrix product in float32 at least; padding is set to zero in front of it, where NaN would spread."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    inner = x if valid is None else x.masked_fill(~valid[..., None], 0)
    out = F.linear(inner.to(wide), weight.to(wide), bias.to(wide))
    return out if valid is None else out.masked_fill(~valid[..., None], 0), x
