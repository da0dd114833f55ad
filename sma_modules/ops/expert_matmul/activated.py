"""Activation and the product after it in one, which does not keep the hidden rows between them (README.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.backend import Op, forced_backend
from sma_modules.ops.expert_matmul import expert_matmul
from sma_modules.ops.expert_matmul.grouped import (
    matrix_gradient,
    product,
    running_ends,
    why_not_grouped_mm,
    why_not_kernels,
)
from sma_modules.ops.feed_forward import ACTIVATE, activate

OP = Op("activated_expert_matmul")


@OP.backend("reference", priority=90)
@OP.backend("eager")
def _one_after_the_other(
    up: Tensor, gate: Tensor | None, activation: str, weight: Tensor, counts: Tensor, ends: Tensor | None = None
) -> Tensor:
    hidden: Tensor = activate(up, gate, activation)  # type: ignore[arg-type]  # checked by the caller
    return expert_matmul(hidden, weight, counts, ends)


def _why_not(
    up: Tensor, gate: Tensor | None, activation: str, weight: Tensor, counts: Tensor, ends: Tensor | None = None
) -> str | None:
    reason = ACTIVATE.backends["triton"].applies(up, gate, activation)
    return reason or why_not_kernels(up, weight, counts, ends)


@OP.backend("triton", priority=10, applies=_why_not)
def _hidden_rows_twice(
    up: Tensor, gate: Tensor | None, activation: str, weight: Tensor, counts: Tensor, ends: Tensor | None = None
) -> Tensor:
    ends = running_ends(counts, up.shape[0]) if ends is None else ends
    pytorch = forced_backend() != "triton" and why_not_grouped_mm(up, weight, counts, ends) is None
    out: Tensor = _Activated.apply(up, gate, activation, weight, ends, pytorch)  # type: ignore[no-untyped-call]
    return out


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, up: Tensor, gate: Tensor | None, activation: str, weight: Tensor, ends: Tensor, pytorch: bool
    ) -> Any:
        from sma_modules.ops.feed_forward import triton_kernel

        ctx.save_for_backward(up, gate, weight, ends)
        ctx.activation, ctx.pytorch = activation, pytorch
        return product(triton_kernel.activate(up, gate, activation), weight, ends, False, pytorch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from sma_modules.ops.feed_forward import triton_kernel

        up, gate, weight, ends = ctx.saved_tensors
        grad_hidden = product(grad, weight, ends, True, ctx.pytorch)
        wanted = ctx.needs_input_grad[3]
        grad_up, grad_gate, hidden, _ = triton_kernel.activate_backward(
            grad_hidden, up, gate, None, ctx.activation, wanted, False
        )
        grad_weight = matrix_gradient(hidden, grad, ends, ctx.pytorch) if wanted else None
        return grad_up, None if gate is None else grad_gate, None, grad_weight, None, None
