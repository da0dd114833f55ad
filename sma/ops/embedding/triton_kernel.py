"""embedding as a gather, and its gradient as a product.

The gradient of row v is the sum of what comes in at the tokens v: the product of a matrix of zeros and ones with what
comes in. A program makes its part of that matrix from the tokens as it goes, and tensor cores do the rest. Sorting the
tokens instead, as PyTorch does, takes a dozen launches and as much memory as the embedded batch in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.kernel import cdiv, kernel, next_power_of_2

ELEMENTS, WARPS, BACKWARD_WARPS = 4096, 4, 8
BLOCK_V, BLOCK_T, BLOCK_D = 128, 64, 64
"""Rows of the table, tokens and features of a product."""
PROGRAMS = 264
"""About how many share the gradient: two for each multiprocessor of a large device."""


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


def split(count: int, rows: int, d: int) -> tuple[int, int]:
    """Tokens of each program of the backward pass, and how many programs share a block of the table."""
    blocks = cdiv(rows, BLOCK_V) * cdiv(d, BLOCK_D)
    each: int = cdiv(cdiv(count, max(PROGRAMS // blocks, 1)), BLOCK_T) * BLOCK_T
    return each, cdiv(count, each)


def _forward_fake(tokens: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(*tokens.shape, weight.shape[1], dtype=dtype)


@kernel("embedding_forward", fake=_forward_fake)
def forward(tokens: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``(B, L, D)`` of contiguous inputs."""
    out = _forward_fake(tokens, weight, scale, dtype)
    count, d = tokens.numel(), weight.shape[1]
    block_d = min(next_power_of_2(d), 1024)
    block_t = max(1, ELEMENTS // block_d)
    forward_kernel[(cdiv(count, block_t), cdiv(d, block_d))](
        tokens, weight, out, count, weight.shape[0], scale, D=d, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=WARPS
    )
    return out


def _backward_fake(tokens: Tensor, grad: Tensor, rows: int, scale: float) -> Tensor:
    programs = split(tokens.numel(), rows, grad.shape[2])[1]
    return grad.new_empty(programs, rows, grad.shape[2], dtype=torch.float32)


@kernel("embedding_backward", fake=_backward_fake)
def backward(tokens: Tensor, grad: Tensor, rows: int, scale: float) -> Tensor:
    """``(programs, V, D)`` float32: shares of the gradient of the table."""
    shares = _backward_fake(tokens, grad, rows, scale)
    count, d = tokens.numel(), grad.shape[2]
    each, programs = split(count, rows, d)
    backward_kernel[(programs, cdiv(rows, BLOCK_V), cdiv(d, BLOCK_D))](
        tokens,
        grad,
        shares,
        count,
        rows,
        each,
        scale,
        D=d,
        # Zeros and ones are exact in tf32, and three parts of it are a float32.
        PRECISION="tf32x3" if grad.dtype == torch.float32 else "ieee",
        BLOCK_V=BLOCK_V,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        num_warps=BACKWARD_WARPS,
    )
    return shares


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype, ctx.scale = weight.shape[0], weight.dtype, scale
        out: Tensor = forward(tokens, weight, scale, dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return None, backward(tokens, grad.contiguous(), ctx.rows, ctx.scale).sum(0).to(ctx.dtype), None, None


def embedding(tokens: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """See :func:`sma.ops.embedding.embedding`."""
    return _Embedding.apply(tokens.contiguous(), weight.contiguous(), scale, dtype)  # type: ignore[no-any-return]
