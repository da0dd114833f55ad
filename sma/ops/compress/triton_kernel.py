"""Kernels of compress: rows taken from a matrix, and rows added to it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take_kernel(source, index, out, rows, limit, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """``out[r] = source[index[r]]``, zeros where the index is not in ``0 .. limit - 1``."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.load(index + r, mask=r < rows, other=-1).to(tl.int64)
    there = (i >= 0) & (i < limit)
    value = tl.load(source + i[:, None] * D + d, mask=there[:, None] & (d < D), other=0)
    tl.store(out + r[:, None] * D + d, value, mask=(r < rows)[:, None] & (d < D))


@triton.jit
def add_kernel(into, index, rows_in, rows, limit, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """``into[index[r]] += rows_in[r]`` for an index without repeats."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.load(index + r, mask=r < rows, other=-1).to(tl.int64)
    cells = ((i >= 0) & (i < limit))[:, None] & (d < D)
    place = into + i[:, None] * D + d
    more = tl.load(rows_in + r[:, None] * D + d, mask=cells, other=0).to(tl.float32)
    value = tl.load(place, mask=cells, other=0).to(tl.float32) + more
    tl.store(place, value.to(into.dtype.element_ty), mask=cells)
