"""The definition of narrow_linear, token by token."""

import torch
from torch import Tensor


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """One product and sum for each token and output."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    zero = x.new_zeros(weight.shape[0], dtype=wide) + 0 * (weight[:, :0].sum() + bias[:0].sum()).to(wide)
    rows = [
        torch.stack([(x[b, t].to(wide) * w.to(wide)).sum() + c.to(wide) for w, c in zip(weight, bias, strict=True)])
        if weight.shape[0] and (valid is None or valid[b, t])
        else zero
        for b in range(x.shape[0])
        for t in range(x.shape[1])
    ]
    out = torch.stack([*rows, zero])[:-1]
    return out.reshape(*x.shape[:2], weight.shape[0]), x
