"""The definition: one slot and one feature at a time."""

import torch
from torch import Tensor

from sma_modules.ops.gau_output.types import Around, Attended


def gau_output(attended: Attended, around: Around) -> Tensor:
    """In float32 at least, rounded once."""
    (x, weight, bias), (active, confidence, skip, residual) = attended, around
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
