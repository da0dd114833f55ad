"""The kernels of feed_forward as operators, and the gradients around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.column_sums.launch import column_sums
from sma.ops.kernel import cdiv, kernel
from sma.transforms import once_differentiable
from sma_modules.ops.feed_forward.triton_kernel import activate_backward_kernel, activate_kernel
from sma_modules.ops.feed_forward.types import Network

# What may be tuned: bytes of a forward program; tile and rows of a backward program; warps of both.
BLOCK_BYTES = 4096
TILE_ROWS, TILE_COLS = 16, 128
ROWS = 64
WARPS = 4


def _fake_activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    return up.new_empty(up.shape)


@kernel("activate", fake=_fake_activate)
def hidden_values(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """``act(up)``, or ``act(gate) * up``."""
    out, up = _fake_activate(up, gate, activation), up.contiguous()
    if n := out.numel():
        other = up if gate is None else gate.contiguous()
        block = BLOCK_BYTES // up.element_size()
        activate_kernel[(cdiv(n, block),)](up, other, out, n, activation, gate is not None, block, num_warps=WARPS)
    return out


def _fake_backward(
    grad: Tensor, up: Tensor, gate: Tensor | None, other: Tensor | None, activation: str, hidden: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gated, d = gate is not None, up.shape[1]
    width = sums * (1 + gated) * d + (0 if other is None else other.shape[1])
    return (
        up.new_empty(up.shape),
        up.new_empty(up.shape if gated else (0, d)),
        up.new_empty(up.shape if hidden else (0, d)),
        up.new_empty(width),
    )


@kernel("activate_backward", fake=_fake_backward)
def activate_backward(
    grad: Tensor, up: Tensor, gate: Tensor | None, other: Tensor | None, activation: str, hidden: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of up and gate (without a gate empty), where asked for the hidden values, and column sums one behind
    the other: of the gradients where asked for, and of ``other``, with as many rows, where it is given.
    """
    grad_up, grad_gate, values, total = _fake_backward(grad, up, gate, other, activation, hidden, sums)
    gated, (n_rows, d) = gate is not None, up.shape
    d_other = 0 if other is None else other.shape[1]
    programs = cdiv(n_rows, ROWS)
    partial = up.new_empty(programs, total.numel(), dtype=torch.float32)
    if programs:
        up = up.contiguous()
        activate_backward_kernel[(programs, cdiv(d, TILE_COLS) + cdiv(d_other, TILE_COLS))](
            grad.contiguous(), up, up if gate is None else gate.contiguous(), grad_up, grad_gate, values,
            up if other is None else other.contiguous(), partial, n_rows, d, d_other, activation, gated, hidden, sums,
            TILE_ROWS, TILE_COLS, ROWS, num_warps=WARPS,
        )  # fmt: skip
    return grad_up, grad_gate, values, column_sums(partial, up.dtype) if total.numel() else total


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, gate: Tensor | None, activation: str) -> Any:
        ctx.save_for_backward(up, gate)
        ctx.activation = activation
        return hidden_values(up, gate, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        up, gate = ctx.saved_tensors
        grads = activate_backward(grad, up, gate, None, ctx.activation, False, False)
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
        a = _linear(x, up, up_bias)
        b = None if gate is None else _linear(x, gate, gate_bias)
        y = _linear(hidden_values(a, b, activation), down, down_bias)
        ctx.save_for_backward(x, up, gate, down, a, b)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, up, gate, down, a, b = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_a, grad_b, hidden, sums = activate_backward(
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


def activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """One launch forward, one backward."""
    out: Tensor = _Activate.apply(up, gate, activation)  # type: ignore[no-untyped-call]
    return out


def feed_forward(x: Tensor, network: Network) -> Tensor:
    """Keeps the results of the first products, and computes the hidden values again in the backward pass."""
    up, gate, down, activation = network
    out: Tensor = _FeedForward.apply(  # type: ignore[no-untyped-call]
        x, *up, *(gate or (None, None)), *down, activation
    )
    return out
