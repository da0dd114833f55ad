"""Kernels of embedding: a gather, and its gradient as a product.

The gradient of row v is the sum of what comes in at the tokens v: the product of a matrix of zeros and ones with what
comes in. A program makes its part of that matrix from the tokens as it goes, and tensor cores do the rest. Sorting the
tokens instead, as PyTorch does, takes a dozen launches and as much memory as the embedded batch in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    tokens, weight, out, count, rows, scale, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``out[t] = scale * weight[tokens[t]]``, zeros where there is no such row."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    v = tl.load(tokens + t, mask=t < count, other=-1).to(tl.int64)
    there = (v >= 0) & (v < rows)
    value = tl.load(weight + v[:, None] * D + d, mask=there[:, None] & (d < D), other=0).to(tl.float32) * scale
    tl.store(out + t[:, None] * D + d, value.to(out.dtype.element_ty), mask=(t < count)[:, None] & (d < D))


@triton.jit
def backward_kernel(
    tokens,
    grad,
    shares,
    count,
    rows,
    each,
    scale,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """This program's share of the gradient of a block of the table, from ``each`` tokens."""
    program = tl.program_id(0)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for first in range(0, each, BLOCK_T):
        t = program.to(tl.int64) * each + first + tl.arange(0, BLOCK_T)
        token = tl.load(tokens + t, mask=t < count, other=-1).to(tl.int64)
        token = tl.where((token >= 0) & (token < rows), token, -1).to(tl.int32)
        g = tl.load(grad + t[:, None] * D + d, mask=(t < count)[:, None] & (d < D), other=0)
        total = tl.dot((v[:, None] == token[None, :]).to(g.dtype), g, total, input_precision=PRECISION)
    place = shares + (program.to(tl.int64) * rows + v[:, None]) * D + d
    tl.store(place, total * scale, mask=(v < rows)[:, None] & (d < D))
