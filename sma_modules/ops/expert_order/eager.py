"""Sorting by expert, dispatch and combine with the operations of PyTorch. Only gathers, also in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.transforms import transformed
from sma_modules.ops.expert_order.types import ExpertOrder


def order_by_expert(choice: Tensor, n_experts: int) -> ExpertOrder:
    """One stable sort; its inverse by one scatter without collisions."""
    order = choice.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    # Comparing and adding is deterministic on every device; bincount is not.
    counts = (choice.flatten()[:, None] == torch.arange(n_experts, device=choice.device)).sum(0)
    return ExpertOrder(order, inverse, counts, counts.cumsum(0, dtype=torch.int32), choice.shape[1])


def dispatch(x: Tensor, order: ExpertOrder) -> Tensor:
    """A gather of rows."""
    sources = order.order // order.top_k
    return _gather(x, sources, order.inverse, order.top_k)


def combine(rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """A gather of rows and a sum."""
    entries = _gather(rows, order.inverse, order.order, 1).reshape(*weight.shape, rows.shape[1])
    return (entries * weight[..., None].to(rows.dtype)).sum(1)


def _gather(x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
    if transformed():
        return x.index_select(0, index)
    rows: Tensor = _Gather.apply(x, index, back, copies)  # type: ignore[no-untyped-call]
    return rows


class _Gather(torch.autograd.Function):
    """Rows ``index`` of x, each of which occurs ``copies`` times: at the places that ``back`` lists row by row.

    The gradient of a plain ``index_select`` adds atomically on an accelerator; knowing the places, it is a gather.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        places = grad.index_select(0, back)
        return places.reshape(-1, ctx.copies, grad.shape[1]).sum(1), None, None, None
