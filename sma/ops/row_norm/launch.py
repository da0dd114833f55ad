"""Launches of the kernels of row_norm as operators, its gradient, and what other operations with a norm share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.row_norm.triton_kernel import backward_kernel, forward_kernel
from sma.ops.row_norm.types import RowNorm
from sma.transforms import once_differentiable

ELEMENTS = 2048
"""Numbers of a block of tokens, with WARPS warps."""
WARPS = 8
PROGRAMS = 4 * 132
"""About how many programs share the gradients of the weights: as many as run at once on an H100."""


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
    out: Tensor = _RowNorm.apply(rows, norm.weight, norm.bias, norm.centred, norm.eps)  # type: ignore[no-untyped-call]
    return out.view(x.shape)
