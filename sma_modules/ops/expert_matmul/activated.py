"""Activation and the product after it in one, which does not keep the hidden rows between them (README.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.transforms import once_differentiable
from sma_modules.ops.expert_matmul import grouped, launch
from sma_modules.ops.feed_forward.launch import activate_backward, hidden_values


class _Activated(torch.autograd.Function):
    """Keeps the results of the first products, and computes the hidden rows again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, up: Tensor, gate: Tensor | None, activation: str, weight: Tensor, ends: Tensor, pytorch: bool
    ) -> Any:
        ctx.save_for_backward(up, gate, weight, ends)
        ctx.activation, ctx.pytorch = activation, pytorch
        product = grouped.rows_times_matrices if pytorch else launch.rows_times_matrices
        return product(hidden_values(up, gate, activation), weight, ends, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        up, gate, weight, ends = ctx.saved_tensors
        products = grouped if ctx.pytorch else launch
        wanted = ctx.needs_input_grad[3]
        grad_hidden = products.rows_times_matrices(grad, weight, ends, True)
        grad_up, grad_gate, hidden, _ = activate_backward(grad_hidden, up, gate, None, ctx.activation, wanted, False)
        grad_weight = products.rows_times_rows(hidden, grad, ends) if wanted else None
        return grad_up, None if gate is None else grad_gate, None, grad_weight, None, None


def by_grouped_mm(
    up: Tensor, gate: Tensor | None, activation: str, weight: Tensor, counts: Tensor, ends: Tensor | None = None
) -> Tensor:
    """With PyTorch's grouped product."""
    ends = grouped.running_ends(counts, up.shape[0]) if ends is None else ends
    out: Tensor = _Activated.apply(up, gate, activation, weight, ends, True)  # type: ignore[no-untyped-call]
    return out


def by_kernels(
    up: Tensor, gate: Tensor | None, activation: str, weight: Tensor, counts: Tensor, ends: Tensor | None = None
) -> Tensor:
    """With the Triton kernels."""
    ends = grouped.running_ends(counts, up.shape[0]) if ends is None else ends
    out: Tensor = _Activated.apply(up, gate, activation, weight, ends, False)  # type: ignore[no-untyped-call]
    return out
