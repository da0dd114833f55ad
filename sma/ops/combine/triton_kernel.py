"""combine in one kernel forward and one backward, which takes the active rows alone where nothing else has a gradient.

Only the sum in front of the activation is kept for the backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sma.ops.row_norm.triton_kernel import affine, scale, unscale

PARTS = 1 << 16
"""Probabilities of dropout are multiples of one part."""
ZEROS = 256
"""So many gradients of weights a program sets to zero at a time."""


@triton.jit
def _kept(seed, t, dropped, BLOCK_D: tl.constexpr):
    """Which numbers of tokens ``t`` are kept if ``dropped`` parts are not, always the same for a seed.

    Eight at a time, of 16 bits each, from Philox with 7 rounds, the fewest that pass every test of its authors (Salmon
    et al., 2011).
    """
    eighth = t[:, None] * (BLOCK_D // 8) + tl.arange(0, BLOCK_D // 8)[None, :]
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed), eighth, n_rounds=7)
    words = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3)).to(tl.uint32, bitcast=True)
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= dropped


@triton.jit
def exp(x):
    """e^x to one unit in the last place: that of the hardware loses what the product with log2(e) is rounded by."""
    x = tl.minimum(tl.maximum(x, -100.0), 88.0)
    high = x * 1.44269502
    low = tl.fma(x, 1.44269502, -high) + x * 1.92596303e-8
    return tl.exp2(high) * (1.0 + low * 0.693147182)


@triton.jit
def silu(x):
    return tl.div_rn(x, 1.0 + exp(-x))


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    """EXACT as in :func:`~sma.ops.row_norm.triton_kernel.scale`."""
    if EXACT:
        return tl.div_rn(1.0, 1.0 + exp(-x))
    return 1.0 / (1.0 + tl.exp2(x * -1.44269504))


@triton.jit
def forward_kernel(
    h,
    row,
    weight,
    skip,
    skip_bias,
    residual,
    norm_weight,
    norm_bias,
    seed,
    total,
    out,
    tokens,
    dropped,
    scaled_up,
    norm_eps,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_SKIP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,
    DROP_SUM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of tokens, each with all of its features."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (t < tokens)[:, None] & (d < D)
    place = t[:, None] * D + d
    r = tl.load(row + t, mask=t < tokens, other=-1).to(tl.int64)
    active = r >= 0
    s = tl.load(h + r[:, None] * D + d, mask=active[:, None] & (d < D), other=0).to(tl.float32)
    if HAS_WEIGHT:
        s = s * tl.load(weight + t, mask=active, other=0).to(tl.float32)[:, None]
    if DROP and not DROP_SUM:
        s = tl.where(_kept(seed, t, dropped, BLOCK_D), s * scaled_up, 0.0)
    if HAS_SKIP:
        s += tl.load(skip + place, mask=inside, other=0).to(tl.float32)
    if HAS_SKIP_BIAS:
        s += tl.load(skip_bias + d, mask=d < D, other=0).to(tl.float32)
    if DROP and DROP_SUM:
        s = tl.where(_kept(seed, t, dropped, BLOCK_D), s * scaled_up, 0.0)
    if HAS_RESIDUAL:
        s += tl.load(residual + place, mask=inside, other=0).to(tl.float32)
    if KEEP:
        tl.store(total + place, s.to(total.dtype.element_ty), mask=inside)
        s = s.to(total.dtype.element_ty).to(tl.float32)  # the backward knows the rounded sum: differentiate just that
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    if SILU:
        s = silu(s) if EXACT else s * _sigmoid(s, EXACT)
    if NORM:
        s, _ = scale(tl.where(inside, s, 0.0), norm_eps, inside, D, CENTRED, EXACT)
        s = affine(s, norm_weight, norm_bias, d, D, WEIGHT_STRIDE, HAS_BIAS)
    tl.store(out + place, s.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad,
    total,
    h,
    row,
    weight,
    norm_weight,
    seed,
    grad_residual,
    grad_skip,
    grad_h,
    grad_weight,
    shares,
    tokens,
    blocks,
    dropped,
    scaled_up,
    norm_eps,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SKIP_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,
    DROP_SUM: tl.constexpr,
    KEEP: tl.constexpr,
    STORE_SUM: tl.constexpr,
    STORE_SKIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Blocks of tokens one after the other, and their share of the gradients of the norm."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)[None, :]
    sum_weight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # over the blocks; over their tokens at the end
    sum_bias = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    sum_skip = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    EXACT: tl.constexpr = grad.dtype.element_ty == tl.float32
    for block in range(blocks):
        t = (program.to(tl.int64) * blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < tokens)[:, None] & (d < D)
        place = t[:, None] * D + d
        g = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
        if KEEP:
            s = tl.load(total + place, mask=inside, other=0).to(tl.float32)
            if SILU:
                gate = _sigmoid(s, EXACT)
            if NORM:
                y = s
                if SILU:
                    y = silu(s) if EXACT else s * gate
                scaled, rstd = scale(tl.where(inside, y, 0.0), norm_eps, inside, D, CENTRED, EXACT)
                if HAS_BIAS:
                    sum_bias += g
                if WEIGHT_STRIDE >= 0:
                    sum_weight += g * scaled
                    g = g * tl.load(norm_weight + d * WEIGHT_STRIDE, mask=d < D, other=0).to(tl.float32)
                g = unscale(g, scaled, rstd, inside, D, CENTRED)
            if SILU:
                g = g * gate * (1.0 + s * (1.0 - gate))
        if STORE_SUM:
            tl.store(grad_residual + place, g.to(grad_residual.dtype.element_ty), mask=inside)
        if DROP and DROP_SUM:
            g = tl.where(_kept(seed, t, dropped, BLOCK_D), g * scaled_up, 0.0)
        if HAS_SKIP_BIAS:
            sum_skip += g
        if STORE_SKIP:
            tl.store(grad_skip + place, g.to(grad_skip.dtype.element_ty), mask=inside)
        if DROP and not DROP_SUM:
            g = tl.where(_kept(seed, t, dropped, BLOCK_D), g * scaled_up, 0.0)
        r = tl.load(row + t, mask=t < tokens, other=-1).to(tl.int64)
        cells = (r >= 0)[:, None] & (d < D)
        if HAS_WEIGHT:
            w = tl.load(weight + t, mask=r >= 0, other=0).to(tl.float32)
            value = tl.load(h + r[:, None] * D + d, mask=cells, other=0).to(tl.float32)
            tl.store(grad_weight + t, tl.sum(tl.where(cells, g * value, 0.0), 1), mask=t < tokens)
            g = g * w[:, None]
        tl.store(grad_h + r[:, None] * D + d, g.to(grad_h.dtype.element_ty), mask=cells)
    share = shares + program * D + d
    if HAS_SKIP_BIAS:
        tl.store(share, tl.sum(sum_skip, 0)[None, :], mask=d < D)
        share += tl.num_programs(0) * D
    if NORM and WEIGHT_STRIDE >= 0:
        tl.store(share, tl.sum(sum_weight, 0)[None, :], mask=d < D)
        share += tl.num_programs(0) * D
    if NORM and HAS_BIAS:
        tl.store(share, tl.sum(sum_bias, 0)[None, :], mask=d < D)


@triton.jit
def rows_backward_kernel(
    grad,
    h,
    index,
    row,
    weight,
    seed,
    grad_h,
    grad_weight,
    tokens,
    rows,
    dropped,
    scaled_up,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Where the rows alone have a gradient, and their weights: a block of rows, and zeros for what is not active."""
    program = tl.program_id(0).to(tl.int64)
    r = program * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)[None, :]
    t = tl.load(index + r, mask=r < rows, other=-1)
    there = (t >= 0) & (t < tokens)
    cells = there[:, None] & (d < D)
    g = tl.load(grad + t[:, None] * D + d, mask=cells, other=0).to(tl.float32)
    if DROP:
        g = tl.where(_kept(seed, t, dropped, BLOCK_D), g * scaled_up, 0.0)
    if HAS_WEIGHT:
        value = tl.load(h + r[:, None] * D + d, mask=cells, other=0).to(tl.float32)
        tl.store(grad_weight + t, tl.sum(g * value, 1), mask=there)
        g = g * tl.load(weight + t, mask=there, other=0).to(tl.float32)[:, None]
        for start in range(program * BLOCK_T, tokens, tl.num_programs(0) * BLOCK_T):
            other = start + tl.arange(0, BLOCK_T)
            inactive = tl.load(row + other, mask=other < tokens, other=0) < 0
            tl.store(grad_weight + other, tl.zeros((BLOCK_T,), tl.float32), mask=inactive)
    tl.store(grad_h + r[:, None] * D + d, g.to(grad_h.dtype.element_ty), mask=(r < rows)[:, None] & (d < D))
