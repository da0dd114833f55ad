"""tempered_decision by PyTorch's own functions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.ops.tempered_decision import OP


@OP.backend("eager")
def tempered_decision(
    x: Tensor, weight: Tensor, bias: Tensor, balance: Tensor, temp: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """A matrix product in float32 at least, and what follows."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    margin = logits[:, 1::2] - logits[:, 0::2] + balance.to(dtype)
    confidence = torch.sigmoid(margin / temp.to(dtype).exp())
    return ~(confidence <= 0.5) & live[:, None], confidence
