"""Registers the kernels: when they apply, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.kernel import FLOATS, why_not_triton_on
from sma_modules.ops.expert_order import COMBINE, DISPATCH, ORDER
from sma_modules.ops.expert_order.order import ExpertOrder

MAX_EXPERTS = 512


def _order_applies(choice: Tensor, n_experts: int) -> str | None:
    if n_experts > MAX_EXPERTS:
        return f"the kernel sorts at most {MAX_EXPERTS} experts, got {n_experts}"
    if choice.numel() >= 2**31:
        return f"the kernel sorts fewer than 2^31 entries, got {choice.numel()}"
    return why_not_triton_on(choice, (torch.int64, torch.int32))


@ORDER.backend("triton", priority=10, applies=_order_applies)
def order_by_expert(choice: Tensor, n_experts: int) -> ExpertOrder:
    """A counting sort in two launches."""
    from sma_modules.ops.expert_order import triton_kernel

    order, inverse, counts, ends = triton_kernel.order_by_expert(choice, n_experts)
    return ExpertOrder(order, inverse, counts, ends, choice.shape[1])


def _dispatch_applies(x: Tensor, order: ExpertOrder) -> str | None:
    return why_not_triton_on(x)


def _combine_applies(rows: Tensor, weight: Tensor, order: ExpertOrder) -> str | None:
    if weight.dtype not in FLOATS:
        return f"the kernel takes weights in float32, bfloat16, float16, got {weight.dtype}"
    return why_not_triton_on(rows)


@DISPATCH.backend("triton", priority=10, applies=_dispatch_applies)
def dispatch(x: Tensor, order: ExpertOrder) -> Tensor:
    """One launch forward, one backward."""
    rows: Tensor = _Dispatch.apply(x, order.order, order.inverse, order.top_k)  # type: ignore[no-untyped-call]
    return rows


@COMBINE.backend("triton", priority=10, applies=_combine_applies)
def combine(rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """One launch forward, one backward; added up in float32."""
    y: Tensor = _Combine.apply(rows, weight, order.inverse)  # type: ignore[no-untyped-call]
    return y


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Any:
        from sma_modules.ops.expert_order import triton_kernel

        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return triton_kernel.spread(x, order, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from sma_modules.ops.expert_order import triton_kernel

        return triton_kernel.gather(grad, ctx.saved_tensors[0], None, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, inverse: Tensor) -> Any:
        from sma_modules.ops.expert_order import triton_kernel

        ctx.save_for_backward(rows, weight, inverse)
        return triton_kernel.gather(rows, inverse, weight, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from sma_modules.ops.expert_order import triton_kernel

        rows, weight, inverse = ctx.saved_tensors
        return *triton_kernel.combine_backward(grad, rows, inverse, weight), None
