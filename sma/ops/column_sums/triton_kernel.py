"""Kernel of column_sums: sums over the rows of a matrix in float32, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_kernel(x, out, rows, each, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """``out[program]`` is the sum of ``each`` rows, a multiple of BLOCK_R."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, each, BLOCK_R):
        r = program * each + start + tl.arange(0, BLOCK_R)
        cells = (r < rows)[:, None] & (d < D)
        total += tl.load(x + r[:, None] * D + d, mask=cells, other=0).to(tl.float32)
    tl.store(out + program * D + d, tl.sum(total, 0).to(out.dtype.element_ty), mask=d < D)
