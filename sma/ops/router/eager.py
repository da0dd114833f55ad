"""router as narrow_linear and element-wise functions of the logits."""

import torch
from torch import Tensor

from sma.ops.narrow_linear.eager import narrow_linear
from sma.ops.router.types import Gate, Routed
from sma.padding import valid_of


def router(x: Tensor, weight: Tensor, bias: Tensor, gate: Gate, valid: Tensor | None, lengths: Tensor | None) -> Routed:
    """Step by step."""
    column = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if valid is None else None
    if lengths is not None:
        valid = valid_of(lengths, x)
    logits, x = narrow_linear(x, weight, bias, valid)
    modules = gate.balance.numel()
    margin, score = gate.margin_and_score(logits.reshape(*x.shape[:2], modules, weight.shape[0] // modules))
    if valid is None:
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    else:
        score = score.masked_fill(~valid[..., None], 0)
    return Routed(x, score, gate.decide(score.detach()), margin.detach(), valid, column, None)
