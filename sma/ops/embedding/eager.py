"""embedding as PyTorch's."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.ops.embedding import OP


@OP.backend("eager")
def embedding(tokens: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Look up, multiply, round."""
    out = F.embedding(tokens.long(), weight)
    return (out if scale == 1 else out * scale).to(dtype)
