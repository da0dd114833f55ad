"""embedding as PyTorch's."""

import torch
from torch import Tensor
from torch.nn import functional as F


def embedding(tokens: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Look up, multiply, round; the multiplication comes first where the tokens are more than the rows."""
    # What is traced must do for any number of tokens.
    if scale != 1 and not torch.compiler.is_compiling() and weight.shape[0] < tokens.numel():
        return F.embedding(tokens.long(), weight * scale).to(dtype)
    out = F.embedding(tokens.long(), weight)
    return (out if scale == 1 else out * scale).to(dtype)
