"""The definition: one slot and one feature at a time."""

import torch
from torch import Tensor

from sma_modules.ops.gau_output import OP


@OP.backend("reference", priority=90)
def gau_output_reference(
    x: Tensor, weight: Tensor, bias: Tensor, active: Tensor, confidence: Tensor, skip: Tensor, residual: Tensor
) -> Tensor:
    """In float32 at least, rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty_like(residual)
    for s in range(x.shape[0]):
        for d in range(weight.shape[0]):
            total = skip[s, d].to(dtype) + residual[s, d].to(dtype)
            if active[s]:
                product = (x[s].to(dtype) * weight[d].to(dtype)).sum() + bias[d].to(dtype)
                total = total + confidence[s].to(dtype) * product
            out[s, d] = total / (1 + torch.exp(-total))
    return out
