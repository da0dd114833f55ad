"""The definition of row_norm, token by token."""

import torch
from torch import Tensor

from sma.ops.row_norm.types import RowNorm


def normalise(x: Tensor, norm: RowNorm) -> Tensor:
    """One token ``(D,)``."""
    centred = x - x.mean() if norm.centred else x
    out = centred / (centred.square().mean() + norm.eps).sqrt()
    out = out if norm.weight is None else out * norm.weight.to(x.dtype)
    return out if norm.bias is None else out + norm.bias.to(x.dtype)


def row_norm(x: Tensor, norm: RowNorm) -> Tensor:
    """One token after the other."""
    tokens = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
    graph = sum((value[:0].sum() for value in (norm.weight, norm.bias) if value is not None), tokens[:0].sum())
    rows = [normalise(token, norm) for token in tokens]
    return torch.stack([*rows, tokens.new_zeros(x.shape[-1]) + graph])[:-1].view(x.shape).to(x.dtype)
