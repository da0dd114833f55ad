"""Kernels of router, which read the tokens once, forward and backward; README.md derives the gradient.

The width D is a constant of the kernels: rows of a width such as 616 are known to be aligned then, and are read in
vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _difference(pointer, m, at, step, mask, PAIRS: tl.constexpr):
    """The value of module m at ``at``, in rows ``step`` apart: of two rows for a module, the second less the first."""
    if PAIRS:
        off = tl.load(pointer + 2 * m * step + at, mask=mask, other=0).to(tl.float32)
        return tl.load(pointer + (2 * m + 1) * step + at, mask=mask, other=0).to(tl.float32) - off
    return tl.load(pointer + m * step + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _temperature(log_temperature, temperature, LEARNED: tl.constexpr):
    if LEARNED:
        return tl.exp(tl.load(log_temperature).to(tl.float32)) * temperature
    return temperature


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    balance,
    log_temperature,
    valid,
    score,
    active,
    margin,
    seen,
    column,
    counts,
    tokens,
    length,
    temperature,
    threshold,
    D: tl.constexpr,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LEARNED: tl.constexpr,
    MASK: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``EACH`` tokens, and how many of them are active. ``MASK``: valid is None (0), a mask (1) or lengths (2)."""
    scale = _temperature(log_temperature, temperature, LEARNED)
    for m in tl.static_range(M):
        count = tl.zeros((BLOCK_T,), tl.int32)
        offset = tl.load(balance + m).to(tl.float32)
        for first in range(0, EACH, BLOCK_T):
            t = tl.program_id(0).to(tl.int64) * EACH + first + tl.arange(0, BLOCK_T)
            inside = t < tokens
            real = inside
            if MASK == 1:
                real = inside & (tl.load(valid + t, mask=inside, other=0) != 0)
            if MASK == 2:
                real = inside & (t % length < tl.load(valid + t // length, mask=inside, other=0))
            products = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # lanes add up once, at the end
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                w = _difference(weight, m, d, D, d < D, PAIRS)
                part = tl.load(x + t[:, None] * D + d, mask=real[:, None] & (d < D), other=0).to(tl.float32)
                products += part * w
            u = tl.where(real, tl.sum(products, 1) + _difference(bias, m, 0, 1, True, PAIRS), 0.0) + offset
            z = tl.div_rn(u, scale)
            e = tl.exp(-tl.abs(z))  # never too large
            s = tl.where(real, tl.div_rn(tl.where(z >= 0, 1.0, e), 1.0 + e), 0.0)
            chosen = real & ((s <= threshold) == 0)  # NaN is
            tl.store(margin + t * M + m, u, mask=inside)
            tl.store(score + t * M + m, s, mask=inside)
            tl.store(active + t * M + m, chosen, mask=inside)
            if MASK != 1 and m == 0:
                tl.store(seen + t, real, mask=inside)
                tl.store(column + t, t % length, mask=inside)
            count += chosen.to(tl.int32)
        tl.store(counts + m * tl.num_programs(0) + tl.program_id(0), tl.sum(count))


@triton.jit
def backward_kernel(
    x,
    weight,
    log_temperature,
    score,
    margin,
    grad_score,
    rows,
    row,
    grad_x,
    shares,
    tokens,
    temperature,
    D: tl.constexpr,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_THROUGH: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``grad_x = through + grad_margin W`` (in place if ``through`` is given; or with the ``rows`` of those tokens that
    have one in its place), and this program's share of the gradients of weight ``(C, D)``, bias ``(C,)`` and
    log_temperature, one behind the other.
    """
    program = tl.program_id(0)
    C: tl.constexpr = 2 * M if PAIRS else M
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    share = shares + program.to(tl.int64) * (C * D + C + 1)
    inverse = tl.div_rn(1.0, _temperature(log_temperature, temperature, LEARNED))
    by_log_temperature = tl.zeros((BLOCK_T,), tl.float32)
    for m in tl.static_range(M):
        if m > 0:
            tl.debug_barrier()  # another thread may add to what one thread wrote
        w = _difference(weight, m, d, D, d < D, PAIRS)
        by_weight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        by_bias = tl.zeros((BLOCK_T,), tl.float32)
        for first in range(0, TOKENS, BLOCK_T):
            t = program.to(tl.int64) * TOKENS + first + tl.arange(0, BLOCK_T)
            # All loads at once: none depends on another.
            if HAS_ROWS and m == 0:
                r = tl.load(row + t, mask=t < tokens, other=-1).to(tl.int64)
            real = tl.load(score + t * M + m, mask=t < tokens, other=0) != 0  # NaN is
            u = tl.load(margin + t * M + m, mask=t < tokens, other=0)
            g = tl.load(grad_score + t * M + m, mask=t < tokens, other=0)
            # s (1 - s), but not from s, of which little is left of 1 - s near 1.
            e = tl.exp(-tl.abs(u) * inverse)
            g = tl.where(real, g * inverse * tl.div_rn(e, (1.0 + e) * (1.0 + e)), 0.0)
            # Rows without a gradient are not read.
            touched = g != 0
            cells = touched[:, None] & (d < D)
            place = t[:, None] * D + d
            value = tl.load(x + place, mask=cells, other=0).to(tl.float32)
            by_weight += value * g[:, None]
            by_bias += g
            by_log_temperature -= tl.where(touched, g * u, 0.0)
            new = g[:, None] * w
            if HAS_THROUGH or m > 0:
                new += tl.load(grad_x + place, mask=cells, other=0).to(tl.float32)
                tl.store(grad_x + place, new.to(grad_x.dtype.element_ty), mask=cells)
            else:
                if HAS_ROWS:
                    mask = (r >= 0)[:, None] & (d < D)
                    new += tl.load(rows + r[:, None] * D + d, mask=mask, other=0).to(tl.float32)
                tl.store(grad_x + place, new.to(grad_x.dtype.element_ty), mask=(t < tokens)[:, None] & (d < D))
        weights = tl.sum(by_weight, 0)
        biases = tl.sum(by_bias)
        if PAIRS:
            tl.store(share + 2 * m * D + d, -weights, mask=d < D)
            tl.store(share + (2 * m + 1) * D + d, weights, mask=d < D)
        else:
            tl.store(share + m * D + d, weights, mask=d < D)
        if tl.program_id(1) == 0:
            if PAIRS:
                tl.store(share + C * D + 2 * m, -biases)
                tl.store(share + C * D + 2 * m + 1, biases)
            else:
                tl.store(share + C * D + m, biases)
    if tl.program_id(1) == 0:
        tl.store(share + C * D + C, tl.sum(by_log_temperature))
