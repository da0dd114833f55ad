"""Kernels of narrow_linear, which read x once in each pass; the backward adds to the gradient that passes through."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    valid,
    out,
    tokens,
    D: tl.constexpr,
    C: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """C outputs of a block of tokens."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = t < tokens
    if HAS_VALID:
        real = real & (tl.load(valid + t, mask=real, other=0) != 0)
    for c in tl.static_range(C):
        total = tl.zeros((BLOCK_T,), tl.float32)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            w = tl.load(weight + c * D + d, mask=d < D, other=0).to(tl.float32)
            part = tl.load(x + t[:, None] * D + d, mask=real[:, None] & (d < D), other=0).to(tl.float32)
            total += tl.sum(part * w, 1)
        total = tl.where(real, total + tl.load(bias + c).to(tl.float32), 0.0)
        tl.store(out + t * C + c, total, mask=t < tokens)


@triton.jit
def backward_kernel(
    x,
    weight,
    grad_out,
    grad_x,
    grad_weight,
    grad_bias,
    tokens,
    blocks,
    D: tl.constexpr,
    C: tl.constexpr,
    PADDED_C: tl.constexpr,
    HAS_THROUGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``grad_x = through + grad_out W`` (in place if ``through`` is given), and this program's share of the others."""
    program = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    outputs = tl.arange(0, PADDED_C)[:, None]
    total = tl.zeros((PADDED_C, BLOCK_D), tl.float32)
    total_bias = tl.zeros((PADDED_C, 1), tl.float32)
    for block in range(blocks):
        t = (program.to(tl.int64) * blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        touched = tl.zeros((BLOCK_T,), tl.int1)
        for c in tl.static_range(C):
            touched = touched | (tl.load(grad_out + t * C + c, mask=t < tokens, other=0) != 0)  # NaN is
        # Rows without a gradient are not read.
        cells = touched[:, None] & (d < D)
        place = t[:, None] * D + d
        value = tl.load(x + place, mask=cells, other=0).to(tl.float32)
        if HAS_THROUGH:
            new = tl.load(grad_x + place, mask=cells, other=0).to(tl.float32)
        else:
            new = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for c in tl.static_range(C):
            g = tl.load(grad_out + t * C + c, mask=t < tokens, other=0)
            new += g[:, None] * tl.load(weight + c * D + d, mask=d < D, other=0).to(tl.float32)
            total += tl.where(outputs == c, tl.sum(value * g[:, None], 0)[None, :], 0.0)
            total_bias += tl.where(outputs == c, tl.sum(g), 0.0)
        written = cells if HAS_THROUGH else (t < tokens)[:, None] & (d < D)
        tl.store(grad_x + place, new.to(grad_x.dtype.element_ty), mask=written)
    tl.store(grad_weight + (program * C + outputs) * D + d, total, mask=(outputs < C) & (d < D))
    if tl.program_id(1) == 0:
        tl.store(grad_bias + program * C + outputs, total_bias, mask=outputs < C)
