"""Grouped matrix products as Triton kernels: one program a tile, which finds its expert by itself.

How many rows an expert has is known on the device only. R rows of E experts make at most ``R / BM + E`` tiles of BM
rows, none of which crosses from one expert to the next: so many programs start, and those beyond the last tile stop.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def _add_product(total, a, b, PRECISION: tl.constexpr, BK: tl.constexpr):
    """``total + a b``. In float32 the sum is not left to the tensor cores, which round it towards zero."""
    if a.dtype == tl.float32:
        # The last option keeps the compiler from making one operation of product and sum.
        return total + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=BK)
    return tl.dot(a, b, total)


@triton.jit
def product_kernel(
    x,
    weight,
    ends,
    out,
    rows,
    row_tiles,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of ``out[r] = x[r] @ weight[e(r)]``, or of ``x[r] @ weight[e(r)]^T``."""
    col_tiles: tl.constexpr = (COLS + BN - 1) // BN
    program = tl.program_id(0)
    group = program // (GROUP * col_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    tile = group * GROUP + program % (GROUP * col_tiles) % height
    col_tile = program % (GROUP * col_tiles) // height

    # Which expert: the first one whose tiles, counted from expert 0, reach beyond this one.
    e = tl.arange(0, E_PAD)
    end = tl.load(ends + e, mask=e < E, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    begin, end = tl.minimum(tl.maximum(begin, 0), rows), tl.minimum(tl.maximum(end, 0), rows)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BM)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    if expert < E:
        mine = e == expert
        first = tl.sum(tl.where(mine, begin + (tile - last + tiles) * BM, 0), 0)
        stop = tl.sum(tl.where(mine, end, 0), 0)

        r = first + tl.arange(0, BM)
        n = col_tile * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        a_at = x + r.to(tl.int64)[:, None] * DEPTH + k[None, :]
        b_at = weight + expert.to(tl.int64) * (DEPTH * COLS)
        if TRANSPOSED:
            b_at += n[None, :] * DEPTH + k[:, None]
        else:
            b_at += k[:, None] * COLS + n[None, :]
        total = tl.zeros((BM, BN), tl.float32)
        for start in range(0, DEPTH, BK):
            a_mask, b_mask = (r < stop)[:, None], (n < COLS)[None, :]
            if DEPTH % BK:
                a_mask, b_mask = a_mask & (start + k < DEPTH)[None, :], b_mask & (start + k < DEPTH)[:, None]
            a = tl.load(a_at, mask=a_mask, other=0.0)
            b = tl.load(b_at, mask=b_mask, other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = _add_product(total, a, b, PRECISION, BK)
            a_at += BK
            b_at += BK if TRANSPOSED else BK * COLS
        at = out + r.to(tl.int64)[:, None] * COLS + n[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=(r < stop)[:, None] & (n < COLS)[None, :])


@triton.jit
def gradient_kernel(
    x,
    grad,
    ends,
    out,
    rows,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of ``out[e] = sum_r x[r]^T grad[r]`` over the rows of expert e; zeros where it has none."""
    row_tiles: tl.constexpr = (D_IN + BM - 1) // BM
    expert = tl.program_id(1)
    m = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) // row_tiles * BN + tl.arange(0, BN)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    begin, end = tl.minimum(tl.maximum(begin, 0), rows), tl.minimum(tl.maximum(tl.load(ends + expert), 0), rows)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, end, BK):
        r = start + tl.arange(0, BK)
        inside = (r < end)[:, None]
        a = tl.load(x + r.to(tl.int64)[:, None] * D_IN + m[None, :], mask=inside & (m < D_IN)[None, :], other=0.0)
        b = tl.load(grad + r.to(tl.int64)[:, None] * D_OUT + n[None, :], mask=inside & (n < D_OUT)[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = _add_product(total, tl.trans(a), b, PRECISION, BK)
    at = out + expert.to(tl.int64) * (D_IN * D_OUT) + m[:, None] * D_OUT + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < D_IN)[:, None] & (n < D_OUT)[None, :])
