# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The gradient of a table of biases, in the same bits every time."""

import triton
import triton.language as tl

from sma_modules.ops.window_attention.triton_kernel.scores import INFINITY_BITS, PTX


@triton.jit
def _exponent(peak, width):
    """Power of two that makes an integer of ``width`` bits of the largest gradient, given by its bits as a float."""
    bits = tl.load(peak)
    return tl.minimum(tl.maximum(width - ((bits >> 23) - 126), -126), 126), bits


@triton.jit
def _count(table, index, x, ONCE: tl.constexpr):
    """Add numbers, rounded to 32 bits, to the integers of 64 in a table; anything for those that are not finite.

    ONCE: no two threads hold the same number. Then those that have them add them, see ``_number``.
    """
    if PTX and ONCE:
        code: tl.constexpr = """{
            .reg .pred some;
            .reg .b32 number;
            .reg .b64 at, whole;
            cvt.rni.s32.f32 number, $3;
            setp.ne.s32 some, number, 0;
            cvt.s64.s32 whole, number;
            mad.wide.s32 at, $2, 8, $1;
            @some red.relaxed.gpu.global.add.u64 [at], whole;
            mov.b32 $0, 0;
        }"""
        tl.inline_asm_elementwise(code, "=r,l,r,f", [table.to(tl.int64), index, x], tl.int32, is_pure=False, pack=1)
    else:
        whole = (tl.where(tl.abs(x) < 2.0**31, x, 0.0) + tl.where(x < 0, -0.5, 0.5)).to(tl.int64)
        tl.atomic_add(table + index, whole, mask=whole != 0, sem="relaxed")


@triton.jit
def _diagonals(x, BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr):
    """Sums ``(SPAN,)`` of a tile along its diagonals: entry ``c - r + BM - 1`` is the one of row r and column c."""
    r = tl.arange(0, BM)[:, None]
    c = tl.arange(0, SPAN)[None, :] - (BM - 1) + r
    inside = (c >= 0) & (c < BN)
    return tl.sum(tl.where(inside, tl.gather(x, tl.where(inside, c, 0), 1), 0.0), 0)


@triton.jit(do_not_specialize=["programs", "window", "entries"])
def local_table_kernel(
    partial, d_table, programs, window, entries, OFFSETS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the diagonals of all tiles, in a fixed order. ``programs`` counts heads too."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    diagonal = entry - (3 * window - BM)
    first = tl.maximum(tl.min(diagonal, 0) - (SPAN - 1), 0) // BN
    end = tl.minimum(tl.maximum(tl.max(diagonal, 0), -1) // BN + 1, OFFSETS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for offset in range(first, end):
        at = diagonal - offset * BN
        inside = (at >= 0) & (at < SPAN)
        for row in range(0, programs, ROWS):
            rows = row + tl.arange(0, ROWS)
            where = (rows[:, None].to(tl.int64) * OFFSETS + offset) * SPAN + at[None, :]
            total += tl.load(partial + where, mask=(rows < programs)[:, None] & inside[None, :], other=0.0)
    tl.store(d_table + entry, tl.sum(total, 0).to(d_table.dtype.element_ty), mask=entry < entries)


@triton.jit(do_not_specialize=["entries", "width"])
def original_table_kernel(partial, peak, d_table, entries, width, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the copies, exactly, and scales back. All of it is NaN if any gradient of a score was not finite."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for copy in tl.static_range(COPIES):
        total += tl.load(partial + copy * entries + entry, mask=entry < entries, other=0)
    exponent, bits = _exponent(peak, width)
    back = ((1023 - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    sums = (total.to(tl.float64) * back).to(tl.float32)
    sums = tl.where(bits >= INFINITY_BITS, float("nan"), sums)
    tl.store(d_table + entry, sums.to(d_table.dtype.element_ty), mask=entry < entries)
