"""row_norm in one kernel forward and one backward, which computes the statistics anew."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.row_norm import RowNorm

ELEMENTS = 2048
"""Numbers of a block of tokens, with WARPS warps."""
WARPS = 8
PROGRAMS = 4 * 132
"""About how many programs share the gradients of the weights: as many as run at once on an H100."""


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


def sizes(d: int) -> tuple[int, int, int]:
    """Tokens and features of a block, and warps."""
    block_d = max(next_power_of_2(d), 16)
    return max(1, ELEMENTS // block_d), block_d, WARPS if block_d <= ELEMENTS else 2 * WARPS


def shares(tokens: int, d: int) -> tuple[int, int]:
    """Blocks for each program of a backward pass, and programs."""
    blocks: int = cdiv(tokens, sizes(d)[0])
    each: int = cdiv(blocks, PROGRAMS)
    return each, cdiv(blocks, each)


def stride(weight: Tensor | None) -> int:
    """What :func:`affine` calls so."""
    return -1 if weight is None else int(weight.numel() > 1)


def total(share: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter from the programs' shares ``(programs, ...)``."""
    return _fitted(share.sum(0), parameter)


def totals(shares: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """The gradients of those parameters that are there from the programs' shares ``(parameters, programs, D)``."""
    sums = iter(shares.sum(1) if shares.shape[0] else ())
    return [None if parameter is None else _fitted(next(sums), parameter) for parameter in parameters]


def _fitted(summed: Tensor, parameter: Tensor) -> Tensor:
    """A single number stands for all features."""
    summed = summed if parameter.numel() == summed.numel() else summed.sum()
    return summed.reshape(parameter.shape).to(parameter.dtype)


def _forward_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float) -> Tensor:
    return torch.empty_like(x)


@kernel("row_norm_forward", fake=_forward_fake)
def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float) -> Tensor:
    """``(T, D)`` of a contiguous x."""
    out = torch.empty_like(x)
    tokens, d = x.shape
    block_t, block_d, warps = sizes(d)
    forward_kernel[(cdiv(tokens, block_t),)](
        x,
        x if weight is None else weight,
        x if bias is None else bias,
        out,
        tokens,
        eps,
        D=d,
        CENTRED=centred,
        WEIGHT_STRIDE=stride(weight),
        HAS_BIAS=bias is not None,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return out


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float
) -> tuple[Tensor, Tensor]:
    parameters = (weight is not None) + (bias is not None)
    return torch.empty_like(x), x.new_empty(parameters, shares(*x.shape)[1], x.shape[1], dtype=torch.float32)


@kernel("row_norm_backward", fake=_backward_fake)
def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and each program's shares of those of weight and bias, as far as they are there."""
    outs = _backward_fake(grad, x, weight, bias, centred, eps)
    tokens, d = x.shape
    block_t, block_d, warps = sizes(d)
    each, programs = shares(tokens, d)
    backward_kernel[(programs,)](
        grad,
        x,
        x if weight is None else weight,
        *outs,
        tokens,
        each,
        eps,
        D=d,
        CENTRED=centred,
        WEIGHT_STRIDE=stride(weight),
        HAS_BIAS=bias is not None,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return outs


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.centred, ctx.eps = centred, eps
        out: Tensor = forward(x, weight, bias, centred, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad_x, share = backward(grad.contiguous(), x, weight, bias, ctx.centred, ctx.eps)
        return grad_x, *totals(share, weight, bias), None, None


def row_norm(x: Tensor, norm: RowNorm) -> Tensor:
    """See :func:`sma.ops.row_norm.row_norm`."""
    rows = x.contiguous().view(-1, x.shape[-1])
    out: Tensor = _RowNorm.apply(rows, norm.weight, norm.bias, norm.centred, norm.eps)
    return out.view(x.shape)
