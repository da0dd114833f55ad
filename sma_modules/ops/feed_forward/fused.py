"""Registers the kernels: when they apply, and the gradients around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.backend import forced_backend
from sma.ops.kernel import why_not_triton_on
from sma_modules.ops.feed_forward import ACTIVATE, FEED_FORWARD

# Below so many hidden values a call takes as long as its launches, of which eager operations need fewer in Python.
MIN_HIDDEN = 1 << 20


def _too_small(hidden: int) -> str | None:
    if hidden < MIN_HIDDEN and forced_backend() != "triton":
        return f"the eager operations are faster below {MIN_HIDDEN} hidden values, got {hidden}"
    return None


def _activate_applies(up: Tensor, gate: Tensor | None, activation: str) -> str | None:
    return why_not_triton_on(up) or _too_small(up.numel())


def _feed_forward_applies(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> str | None:
    reason = why_not_triton_on(x) or _too_small(x.shape[0] * up.shape[0])
    if reason is not None:
        return reason
    others = {each.dtype for each in (up, up_bias, gate, gate_bias, down, down_bias) if each is not None}
    if others != {x.dtype}:
        return f"the kernels want one dtype, got {x.dtype} and {', '.join(sorted(map(str, others)))}"
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.get_autocast_dtype(x.device.type):
        return f"autocast would change the dtype from {x.dtype} on the way"
    return None


@ACTIVATE.backend("triton", priority=10, applies=_activate_applies)
def activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """One launch forward, one backward."""
    out: Tensor = _Activate.apply(up, gate, activation)  # type: ignore[no-untyped-call]
    return out


@FEED_FORWARD.backend("triton", priority=10, applies=_feed_forward_applies)
def feed_forward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Keeps what the first products gave, and computes the hidden values again in the backward pass."""
    out: Tensor = _FeedForward.apply(  # type: ignore[no-untyped-call]
        x, up, up_bias, gate, gate_bias, down, down_bias, activation
    )
    return out


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, gate: Tensor | None, activation: str) -> Any:
        from sma_modules.ops.feed_forward import triton_kernel

        ctx.save_for_backward(up, gate)
        ctx.activation = activation
        return triton_kernel.activate(up, gate, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from sma_modules.ops.feed_forward import triton_kernel

        up, gate = ctx.saved_tensors
        grads = triton_kernel.activate_backward(grad, up, gate, None, ctx.activation, False, False)
        return grads[0], None if gate is None else grads[1], None


class _FeedForward(torch.autograd.Function):
    """Seven products: two or three forward and their gradients, PyTorch's; the kernels are what is between them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        gate: Tensor | None,
        gate_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        activation: str,
    ) -> Any:
        from sma_modules.ops.feed_forward import triton_kernel

        a = _linear(x, up, up_bias)
        b = None if gate is None else _linear(x, gate, gate_bias)
        y = _linear(triton_kernel.activate(a, b, activation), down, down_bias)
        ctx.save_for_backward(x, up, gate, down, a, b)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from sma_modules.ops.feed_forward import triton_kernel

        x, up, gate, down, a, b = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_a, grad_b, hidden, sums = triton_kernel.activate_backward(
            grad @ down, a, b, grad if need[6] else None, ctx.activation, need[5], need[2] or need[4]
        )
        width = a.shape[1]
        grad_x = grad_gate = None
        if need[0]:
            grad_x = grad_a @ up
            if gate is not None:
                grad_x.addmm_(grad_b, gate)
        if gate is not None and need[3]:
            grad_gate = grad_b.t() @ x
        return (
            grad_x,
            grad_a.t() @ x if need[1] else None,
            sums[:width] if need[2] else None,
            grad_gate,
            sums[width : 2 * width] if need[4] else None,
            grad.t() @ hidden if need[5] else None,
            sums[-grad.shape[1] :] if need[6] else None,
            None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
