"""Launches of the kernels of embedding as operators, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.embedding.triton_kernel import backward_kernel, forward_kernel
from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.transforms import once_differentiable

ELEMENTS, WARPS, BACKWARD_WARPS = 4096, 4, 8
BLOCK_V, BLOCK_T, BLOCK_D = 128, 64, 64
"""Rows of the table, tokens and features of a product."""
PROGRAMS = 264
"""About how many share the gradient: two for each multiprocessor of a large device."""


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
    return _Embedding.apply(tokens.contiguous(), weight.contiguous(), scale, dtype)  # type: ignore[no-any-return,no-untyped-call]
