"""The definition of router, token by token."""

import torch
from torch import Tensor

from sma.ops.router.types import Gate, Routed


def router(x: Tensor, weight: Tensor, bias: Tensor, gate: Gate, valid: Tensor | None, lengths: Tensor | None) -> Routed:
    """One margin, score and decision for each token and module."""
    (batch, length), modules = x.shape[:2], gate.balance.numel()
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    temperature = torch.ones((), dtype=wide, device=x.device) * gate.temperature
    if gate.log_temperature is not None:
        temperature = temperature * gate.log_temperature.to(wide).exp().squeeze()
    # For the graph of a batch without tokens.
    nothing = x.new_zeros((), dtype=wide) + 0 * (weight[:, :0].sum() + bias[:0].sum() + temperature)
    real = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
    margins, scores = [], []
    for b in range(batch):
        for t in range(length):
            real[b, t] = (valid is None or valid[b, t]) and (lengths is None or t < lengths[b])
            for m in range(modules):
                margin, score = gate.balance[m].to(wide) + nothing, nothing
                if real[b, t]:
                    logits = [
                        (x[b, t].to(wide) * weight[c].to(wide)).sum() + bias[c].to(wide)
                        for c in range(weight.shape[0])
                        if c * modules // weight.shape[0] == m
                    ]
                    margin = margin + (logits[0] if len(logits) == 1 else logits[1] - logits[0])
                    score = 1 / (1 + torch.exp(-margin / temperature))
                margins.append(margin)
                scores.append(score)
    margin, score = (torch.stack([*values, nothing])[:-1].view(batch, length, modules) for values in (margins, scores))
    column = torch.tensor([*range(length)] * batch, dtype=torch.int64, device=x.device).view(batch, length)
    active = ~(score.detach() <= gate.threshold)
    return Routed(x, score, active, margin.detach(), real, column if valid is None else None, None)
