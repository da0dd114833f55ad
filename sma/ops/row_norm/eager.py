"""row_norm by PyTorch's own functions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.ops.row_norm.types import RowNorm


def row_norm(x: Tensor, norm: RowNorm) -> Tensor:
    """Normalise, then scale and shift, rounded once, at the end."""
    width = (x.shape[-1],)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    own = norm.weight is not None and norm.weight.shape == width and norm.weight.dtype == wide.dtype
    if norm.centred:
        affine = (norm.weight, norm.bias) if own else (None, None)
        if not own and wide.device.type == "cpu":  # where PyTorch is slow without a weight
            affine = (wide.new_ones(width), wide.new_zeros(width))
        out = F.layer_norm(wide, width, *affine, norm.eps)
        if own:
            return out.to(x.dtype)
    else:
        out = F.rms_norm(wide, width, norm.weight if own else None, norm.eps)
    out = out if own or norm.weight is None else out * norm.weight
    return (out if norm.bias is None else out + norm.bias).to(x.dtype)
