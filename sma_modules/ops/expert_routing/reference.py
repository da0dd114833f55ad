"""The definition of expert_routing: one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.expert_routing.types import ChosenExperts


def choose_experts(logits: Tensor, top_k: int, renormalise: bool) -> ChosenExperts:
    """Sort the experts of each token by probability, the smaller number first among equals."""
    tokens, experts = max(logits.shape[0], 1), logits.shape[1]
    chosen, weights = [], [logits[:0, :top_k]]
    probability, square = logits.sum(0) * 0, logits.sum() * 0
    for row in logits:
        p = row.exp() / row.exp().sum()
        best = sorted(range(experts), key=p.tolist().__getitem__, reverse=True)[:top_k]
        weight = torch.stack([p[e] for e in best])
        chosen.append(best)
        weights.append((weight / weight.sum() if renormalise else weight)[None])
        probability = probability + p / tokens
        square = square + row.exp().sum().log() ** 2 / tokens
    expert = torch.tensor(chosen, dtype=torch.int64, device=logits.device).reshape(-1, top_k)
    return ChosenExperts(expert, torch.cat(weights), probability, square)
