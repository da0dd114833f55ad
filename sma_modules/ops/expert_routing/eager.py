"""expert_routing with the operations of PyTorch."""

from __future__ import annotations

from torch import Tensor

from sma_modules.ops.expert_routing.types import ChosenExperts


def choose_experts(logits: Tensor, top_k: int, renormalise: bool) -> ChosenExperts:
    """A stable sort and not topk: which of two equal experts comes first must not depend on the device."""
    probability = logits.softmax(-1)
    expert = probability.detach().argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weight = probability.gather(1, expert)
    if renormalise:
        weight = weight / weight.sum(-1, keepdim=True)
    tokens = max(logits.shape[0], 1)
    return ChosenExperts(expert, weight, probability.sum(0) / tokens, logits.logsumexp(-1).square().sum() / tokens)
