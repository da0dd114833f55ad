"""The definition of tempered_decision, token by token and module by module."""

import torch
from torch import Tensor

from sma.ops.tempered_decision import OP


@OP.backend("reference", priority=90)
def tempered_decision(
    x: Tensor, weight: Tensor, bias: Tensor, balance: Tensor, temp: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """One token after the other."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    active = torch.zeros(x.shape[0], balance.numel(), dtype=torch.bool, device=x.device)
    confidence = torch.zeros_like(active, dtype=dtype)
    for s in range(x.shape[0]):
        for m in range(balance.numel()):
            off, on = ((x[s].to(dtype) * weight[2 * m + i].to(dtype)).sum() + bias[2 * m + i].to(dtype) for i in (0, 1))
            margin = (on - off + balance[m].to(dtype)) / temp[0].to(dtype).exp()
            confidence[s, m] = 1 / (1 + torch.exp(-margin))
            active[s, m] = live[s] & ~(confidence[s, m] <= 0.5)
    return active, confidence
