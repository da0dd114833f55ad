"""Activation and gate, forward and backward, as Triton kernels.

Both read their inputs once and compute in float32. The backward kernel gives, from the same reads, the hidden values
again (for the gradient of the next matrix) and the column sums of its gradients (for those of the biases).
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

from sma.ops.kernel import kernel

# What may be tuned: elements of a forward program; tile and rows of a backward program; warps of both.
BLOCK = 1024
TILE_ROWS, TILE_COLS = 8, 256
ROWS = 64
WARPS = 4


@triton.jit
def _act(x, ACTIVATION: tl.constexpr):
    """Value and derivative."""
    if ACTIVATION == "relu":
        # Written so that NaN stays NaN, as in PyTorch.
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        value = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    return value, slope


@triton.jit
def activate_kernel(up, gate, out, n, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """``act(up)`` or ``act(gate) * up``, element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    if GATED:
        value, _ = _act(tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32), ACTIVATION)
        value *= a
    else:
        value, _ = _act(a, ACTIVATION)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def activate_backward_kernel(
    grad,
    up,
    gate,
    grad_up,
    grad_gate,
    hidden,
    sums,
    n_rows,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HIDDEN: tl.constexpr,
    SUMS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of ``ROWS x BD`` values, BR rows at a time; their column sums to ``sums (programs, 1 or 2, D)``."""
    program = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    sum_up = tl.zeros((BR, BD), tl.float32)
    sum_gate = tl.zeros((BR, BD), tl.float32)
    for start in range(0, ROWS, BR):
        r = program * ROWS + start + tl.arange(0, BR)
        at = r.to(tl.int64)[:, None] * D + d[None, :]
        inside = (r < n_rows)[:, None] & (d < D)[None, :]
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            value, slope = _act(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
            grad_b = dy * a * slope
            tl.store(grad_gate + at, grad_b.to(grad_gate.dtype.element_ty), mask=inside)
            sum_gate += grad_b
            grad_a = dy * value
            value *= a
        else:
            value, slope = _act(a, ACTIVATION)
            grad_a = dy * slope
        tl.store(grad_up + at, grad_a.to(grad_up.dtype.element_ty), mask=inside)
        sum_up += grad_a
        if HIDDEN:
            tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=inside)
    if SUMS:
        width: tl.constexpr = 2 * D if GATED else D
        to = sums + program.to(tl.int64) * width + d
        tl.store(to, tl.sum(sum_up, 0), mask=d < D)
        if GATED:
            tl.store(to + D, tl.sum(sum_gate, 0), mask=d < D)


def _fake_activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    return up.new_empty(up.shape)


@kernel("activate", fake=_fake_activate)
def activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """``act(up)``, or ``act(gate) * up``."""
    out, up = _fake_activate(up, gate, activation), up.contiguous()
    if n := out.numel():
        other = up if gate is None else gate.contiguous()
        activate_kernel[(triton.cdiv(n, BLOCK),)](
            up, other, out, n, activation, gate is not None, BLOCK, num_warps=WARPS
        )
    return out


def _fake_backward(
    grad: Tensor, up: Tensor, gate: Tensor | None, activation: str, hidden: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gated, d = gate is not None, up.shape[1]
    return (
        up.new_empty(up.shape),
        up.new_empty(up.shape if gated else (0, d)),
        up.new_empty(up.shape if hidden else (0, d)),
        up.new_empty(1 + gated if sums else 0, d),
    )


@kernel("activate_backward", fake=_fake_backward)
def activate_backward(
    grad: Tensor, up: Tensor, gate: Tensor | None, activation: str, hidden: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of up and gate (without a gate empty), and where asked for the hidden values and the column sums of
    the gradients ``(1 or 2, d)``.
    """
    grad_up, grad_gate, values, _ = _fake_backward(grad, up, gate, activation, hidden, sums)
    gated, (n_rows, d) = gate is not None, up.shape
    programs = triton.cdiv(n_rows, ROWS)
    partial = up.new_empty(programs if sums else 0, 1 + gated, d, dtype=torch.float32)
    if up.numel():
        up = up.contiguous()
        activate_backward_kernel[(programs, triton.cdiv(d, TILE_COLS))](
            grad.contiguous(), up, up if gate is None else gate.contiguous(), grad_up, grad_gate, values, partial,
            n_rows, d, activation, gated, hidden, sums, TILE_ROWS, TILE_COLS, ROWS, num_warps=WARPS,
        )  # fmt: skip
    total = partial.sum(0).to(up.dtype) if sums else up.new_empty(0, d)
    return grad_up, grad_gate, values, total
