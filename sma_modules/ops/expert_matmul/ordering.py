"""Bringing the rows of one expert together, and back. Only gathers, also in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertOrder:
    """The order in which T tokens, each going to k experts, are sorted by expert.

    Attributes:
        order: ``(T * k,)`` int64: sorted row r is entry ``order[r]`` of the flattened ``(T, k)`` choice.
        inverse: ``(T * k,)`` int64: entry e of the choice is sorted row ``inverse[e]``.
        counts: ``(E,)`` int64: rows of each expert.
        top_k: k.
    """

    order: Tensor
    inverse: Tensor
    counts: Tensor
    top_k: int


def order_by_expert(choice: Tensor, n_experts: int) -> ExpertOrder:
    """Sort the entries of ``choice (T, k)``, expert numbers in 0..E-1; tokens of one expert keep their order."""
    order = choice.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    # Comparing and adding is deterministic on every device; bincount is not.
    counts = (choice.flatten()[:, None] == torch.arange(n_experts, device=choice.device)).sum(0)
    return ExpertOrder(order, inverse, counts, choice.shape[1])


def dispatch(x: Tensor, order: ExpertOrder) -> Tensor:
    """``x (T, D)`` to rows sorted by expert ``(T * k, D)``, each token k times."""
    sources = order.order // order.top_k
    rows: Tensor = _Gather.apply(x, sources, order.inverse, order.top_k)  # type: ignore[no-untyped-call]
    return rows


def combine(rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """Weighted sum over each token's experts: ``rows (T * k, D)`` and ``weight (T, k)`` to ``(T, D)``."""
    entries: Tensor = _Gather.apply(rows, order.inverse, order.order, 1)  # type: ignore[no-untyped-call]
    entries = entries.reshape(*weight.shape, rows.shape[1])
    return (entries * weight[..., None].to(rows.dtype)).sum(1)


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
