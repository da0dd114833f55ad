"""The definitions: one entry after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.expert_order.types import ExpertOrder


def order_by_expert(choice: Tensor, n_experts: int) -> ExpertOrder:
    """Collect the entries of each expert."""
    entries = choice.flatten().tolist()
    order = [entry for expert in range(n_experts) for entry, chosen in enumerate(entries) if chosen == expert]
    inverse = [order.index(entry) for entry in range(len(entries))]
    counts = [entries.count(expert) for expert in range(n_experts)]
    ends = [sum(counts[: expert + 1]) for expert in range(n_experts)]
    of = choice.device
    return ExpertOrder(
        torch.tensor(order, dtype=torch.int64, device=of),
        torch.tensor(inverse, dtype=torch.int64, device=of),
        torch.tensor(counts, dtype=torch.int64, device=of),
        torch.tensor(ends, dtype=torch.int32, device=of),
        choice.shape[1],
    )


def dispatch(x: Tensor, order: ExpertOrder) -> Tensor:
    """Copy row by row."""
    rows = [x[entry // order.top_k] for entry in order.order.tolist()]
    return torch.stack(rows) if rows else x + 0


def combine(rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """Add up token by token."""
    inverse = order.inverse.reshape(weight.shape).tolist()
    tokens = [
        sum((rows[place] * weight[t, i].to(rows.dtype) for i, place in enumerate(places)), torch.zeros_like(rows[0]))
        for t, places in enumerate(inverse)
    ]
    return torch.stack(tokens) if tokens else rows * weight.sum().to(rows.dtype)
