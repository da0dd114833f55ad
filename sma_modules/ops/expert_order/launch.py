"""The kernels of expert_order as operators, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.transforms import once_differentiable
from sma_modules.ops.expert_order.triton_kernel import (
    combine_backward_kernel,
    count_kernel,
    gather_kernel,
    place_kernel,
    spread_kernel,
)
from sma_modules.ops.expert_order.types import ExpertOrder

# What may be tuned. The sort: programs at most, cells (entries x experts) that one program compares at a time, warps.
SORT_PROGRAMS = 128
SORT_CELLS = 8192
SORT_WARPS = 8
# The movement: elements of a tile, and its width at most.
TILE = 4096
TILE_WIDTH = 1024
WARPS = 4


def _tile(d: int) -> tuple[int, int]:
    """Rows and columns of a tile of ``(., d)``."""
    width = min(next_power_of_2(max(d, 1)), TILE_WIDTH)
    return max(TILE // width, 1), width


def _fake_order(choice: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entries = choice.numel()
    return (
        choice.new_empty(entries, dtype=torch.int64),
        choice.new_empty(entries, dtype=torch.int64),
        choice.new_empty(n_experts, dtype=torch.int64),
        choice.new_empty(n_experts, dtype=torch.int32),
    )


@kernel("expert_order", fake=_fake_order)
def sort(choice: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, inverse, counts and ends (see ``ExpertOrder``) of ``choice (T, k)``, in two launches."""
    order, inverse, counts, ends = _fake_order(choice, n_experts)
    entries, e_pad = choice.numel(), next_power_of_2(n_experts)
    block = min(max(SORT_CELLS // e_pad, 16), 1024)
    share = cdiv(cdiv(max(entries, 1), SORT_PROGRAMS), block) * block
    programs = cdiv(max(entries, 1), share)
    shared = choice.new_empty(programs, n_experts, dtype=torch.int32)
    choice = choice.contiguous()
    count_kernel[(programs,)](choice, shared, entries, share, n_experts, e_pad, block, num_warps=SORT_WARPS)
    place_kernel[(programs,)](
        choice, shared, order, inverse, counts, ends, entries, share, programs, n_experts, e_pad, block,
        min(block, SORT_PROGRAMS), num_warps=SORT_WARPS,
    )  # fmt: skip
    return order, inverse, counts, ends


def _fake_spread(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@kernel("expert_dispatch", fake=_fake_spread)
def spread(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """``x (T, D)`` to ``(T * k, D)``: row r is token ``order[r] // k``."""
    x, rows = x.contiguous(), _fake_spread(x, order, top_k)
    if rows.numel():
        br, bd = _tile(x.shape[1])
        grid = (cdiv(rows.shape[0], br), cdiv(x.shape[1], bd))
        spread_kernel[grid](x, order, rows, rows.shape[0], x.shape[1], top_k, br, bd, num_warps=WARPS)
    return rows


def _fake_gather(rows: Tensor, inverse: Tensor, weight: Tensor | None, top_k: int) -> Tensor:
    return rows.new_empty(inverse.shape[0] // top_k, rows.shape[1])


@kernel("expert_combine", fake=_fake_gather)
def gather(rows: Tensor, inverse: Tensor, weight: Tensor | None, top_k: int) -> Tensor:
    """``rows (T * k, D)`` to ``(T, D)``: the sum of each token's k rows, weighted where ``weight (T, k)`` is given."""
    rows, y = rows.contiguous(), _fake_gather(rows, inverse, weight, top_k)
    if y.numel():
        bt, bd = _tile(y.shape[1])
        grid = (cdiv(y.shape[0], bt), cdiv(y.shape[1], bd))
        given = rows if weight is None else weight.contiguous()
        gather_kernel[grid](
            rows, inverse, given, y, y.shape[0], y.shape[1], top_k, weight is not None, bt, bd, num_warps=WARPS
        )
    return y


def _fake_combine_backward(grad: Tensor, rows: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


@kernel("expert_combine_backward", fake=_fake_combine_backward)
def combine_backward(grad: Tensor, rows: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights of ``combine``, from that of its output ``(T, D)``."""
    grad_rows, grad_weight = _fake_combine_backward(grad, rows, inverse, weight)
    tokens, top_k = weight.shape
    if rows.numel():
        bt, bd = _tile(rows.shape[1])
        combine_backward_kernel[(cdiv(tokens, bt),)](
            grad.contiguous(), rows.contiguous(), inverse, weight.contiguous(), grad_rows, grad_weight, tokens,
            rows.shape[1], top_k, bt, bd, num_warps=WARPS,
        )  # fmt: skip
    else:
        grad_weight.zero_()
    return grad_rows, grad_weight


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Any:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return spread(x, order, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return gather(grad, ctx.saved_tensors[0], None, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, inverse: Tensor) -> Any:
        ctx.save_for_backward(rows, weight, inverse)
        return gather(rows, inverse, weight, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weight, inverse = ctx.saved_tensors
        return *combine_backward(grad, rows, inverse, weight), None


def order_by_expert(choice: Tensor, n_experts: int) -> ExpertOrder:
    """A counting sort in two launches."""
    order, inverse, counts, ends = sort(choice, n_experts)
    return ExpertOrder(order, inverse, counts, ends, choice.shape[1])


def dispatch(x: Tensor, order: ExpertOrder) -> Tensor:
    """One launch forward, one backward."""
    rows: Tensor = _Dispatch.apply(x, order.order, order.inverse, order.top_k)  # type: ignore[no-untyped-call]
    return rows


def combine(rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """One launch forward, one backward; added up in float32."""
    y: Tensor = _Combine.apply(rows, weight, order.inverse)  # type: ignore[no-untyped-call]
    return y
