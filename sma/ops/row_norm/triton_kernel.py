"""Kernels of row_norm, one forward and one backward, which computes the statistics anew."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale(y, eps, inside, D: tl.constexpr, CENTRED: tl.constexpr, EXACT: tl.constexpr):
    """``y (BLOCK_T, BLOCK_D)``, 0 outside, with mean square 1 (and mean 0), and the factor ``(BLOCK_T,)`` for that.

    EXACT: rounded to the nearest float32; what is rounded to 16 bits afterwards needs no more than 22.
    """
    if CENTRED:
        y = tl.where(inside, y - (tl.sum(y, 1) / D)[:, None], 0.0)
    squares = tl.sum(y * y, 1)
    if EXACT:
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, D * 1.0) + eps))
    else:
        rstd = tl.rsqrt(squares / D + eps)
    return y * rstd[:, None], rstd


@triton.jit
def affine(y, weight, bias, d, D: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """``y * weight + bias``; the stride is -1 without a weight and 0 for a single number."""
    if WEIGHT_STRIDE >= 0:
        y = y * tl.load(weight + d * WEIGHT_STRIDE, mask=d < D, other=0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + d, mask=d < D, other=0).to(tl.float32)
    return y


@triton.jit
def unscale(g, scaled, rstd, inside, D: tl.constexpr, CENTRED: tl.constexpr):
    """The gradient of what :func:`scale` was given, from that of what it gave."""
    g = g - scaled * (tl.sum(g * scaled, 1) / D)[:, None]
    if CENTRED:
        g = g - (tl.sum(tl.where(inside, g, 0.0), 1) / D)[:, None]
    return g * rstd[:, None]


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    out,
    tokens,
    eps,
    D: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of tokens."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (t < tokens)[:, None] & (d < D)
    y = tl.load(x + t[:, None] * D + d, mask=inside, other=0).to(tl.float32)
    y, _ = scale(y, eps, inside, D, CENTRED, out.dtype.element_ty == tl.float32)
    y = affine(y, weight, bias, d, D, WEIGHT_STRIDE, HAS_BIAS)
    tl.store(out + t[:, None] * D + d, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad,
    x,
    weight,
    grad_x,
    shares,
    tokens,
    blocks,
    eps,
    D: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Blocks of tokens one after the other, and their share of the gradients of weight and bias."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)[None, :]
    sum_weight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # over the blocks; over their tokens at the end
    sum_bias = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for block in range(blocks):
        t = (program.to(tl.int64) * blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < tokens)[:, None] & (d < D)
        place = t[:, None] * D + d
        g = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
        y = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        scaled, rstd = scale(y, eps, inside, D, CENTRED, x.dtype.element_ty == tl.float32)
        if HAS_BIAS:
            sum_bias += g
        if WEIGHT_STRIDE >= 0:
            sum_weight += g * scaled
            g = g * tl.load(weight + d * WEIGHT_STRIDE, mask=d < D, other=0).to(tl.float32)
        g = unscale(g, scaled, rstd, inside, D, CENTRED)
        tl.store(grad_x + place, g.to(grad_x.dtype.element_ty), mask=inside)
    share = shares + program * D + d
    if WEIGHT_STRIDE >= 0:
        tl.store(share, tl.sum(sum_weight, 0)[None, :], mask=d < D)
        share += tl.num_programs(0) * D
    if HAS_BIAS:
        tl.store(share, tl.sum(sum_bias, 0)[None, :], mask=d < D)
