"""Launches of the kernels of combine as operators, and their gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sma.ops.combine.triton_kernel import PARTS, ZEROS, backward_kernel, forward_kernel, rows_backward_kernel
from sma.ops.combine.types import Finish, Terms, leading
from sma.ops.kernel import cdiv, draw_seed, kernel
from sma.ops.packed import Packed
from sma.ops.row_norm.launch import shares, sizes, stride, totals
from sma.transforms import once_differentiable


def _dropped(dropout: float) -> tuple[int, float]:
    """The parts that are dropped, and what the rest is multiplied by."""
    dropped = min(round(dropout * PARTS), PARTS - 1)
    return dropped, PARTS / (PARTS - dropped)


class Options(NamedTuple):
    """What decides on the kernel."""

    silu: bool
    norm: bool
    centred: bool
    eps: float
    dropout: float
    drop_sum: bool


def _forward_fake(
    h: Tensor,
    row: Tensor,
    weight: Tensor | None,
    skip: Tensor | None,
    skip_bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    silu: bool,
    norm: bool,
    centred: bool,
    eps: float,
    dropout: float,
    drop_sum: bool,
) -> tuple[Tensor, Tensor]:
    like = leading(h, Terms(skip=skip, residual=residual))
    out = h.new_empty(row.numel(), h.shape[1], dtype=like.dtype)
    return out, torch.empty_like(out) if silu or norm else out.new_empty(0)


@kernel("combine_forward", fake=_forward_fake)
def forward(
    h: Tensor,
    row: Tensor,
    weight: Tensor | None,
    skip: Tensor | None,
    skip_bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    silu: bool,
    norm: bool,
    centred: bool,
    eps: float,
    dropout: float,
    drop_sum: bool,
) -> tuple[Tensor, Tensor]:
    """``(B L, D)`` and the sum in front of activation and norm (empty when there is neither); contiguous inputs."""
    out, total = _forward_fake(
        h, row, weight, skip, skip_bias, residual, norm_weight, norm_bias, seed, silu, norm, centred, eps, dropout,
        drop_sum,
    )  # fmt: skip
    tokens, d = out.shape
    block_t, block_d, warps = sizes(d)
    forward_kernel[(cdiv(tokens, block_t),)](
        h,
        row,
        h if weight is None else weight,
        h if skip is None else skip,
        h if skip_bias is None else skip_bias,
        h if residual is None else residual,
        h if norm_weight is None else norm_weight,
        h if norm_bias is None else norm_bias,
        row if seed is None else seed,
        total,
        out,
        tokens,
        *_dropped(dropout),
        eps,
        D=d,
        HAS_WEIGHT=weight is not None,
        HAS_SKIP=skip is not None,
        HAS_SKIP_BIAS=skip_bias is not None,
        HAS_RESIDUAL=residual is not None,
        SILU=silu,
        NORM=norm,
        CENTRED=centred,
        WEIGHT_STRIDE=stride(norm_weight),
        HAS_BIAS=norm_bias is not None,
        DROP=seed is not None,
        DROP_SUM=drop_sum,
        KEEP=silu or norm,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return out, total


def _rows_only(silu: bool, norm: bool, skip_bias: Tensor | None, need_residual: bool, need_skip: bool) -> bool:
    """Whether a gradient arrives at active tokens and nowhere else."""
    return not (silu or norm or need_residual or need_skip or skip_bias is not None)


def _backward_fake(
    grad: Tensor,
    total: Tensor,
    h: Tensor,
    index: Tensor,
    row: Tensor,
    weight: Tensor | None,
    skip_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    silu: bool,
    norm: bool,
    centred: bool,
    eps: float,
    dropout: float,
    drop_sum: bool,
    fixed: bool,
    need_residual: bool,
    need_skip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows_only = _rows_only(silu, norm, skip_bias, need_residual, need_skip)
    apart = need_skip and seed is not None and drop_sum
    parameters = sum(each is not None for each in (skip_bias, norm_weight, norm_bias))

    def part(there: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return grad.new_empty(shape if there else (0,), dtype=dtype)

    return (
        part(need_residual or (need_skip and not apart), *grad.shape, dtype=grad.dtype),
        part(apart, *grad.shape, dtype=grad.dtype),
        torch.zeros_like(h) if fixed and not rows_only else torch.empty_like(h),
        part(weight is not None, row.numel()),
        part(True, parameters, shares(grad.shape[0], h.shape[1])[1], h.shape[1]),
    )


@kernel("combine_backward", fake=_backward_fake)
def backward(
    grad: Tensor,
    total: Tensor,
    h: Tensor,
    index: Tensor,
    row: Tensor,
    weight: Tensor | None,
    skip_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    silu: bool,
    norm: bool,
    centred: bool,
    eps: float,
    dropout: float,
    drop_sum: bool,
    fixed: bool,
    need_residual: bool,
    need_skip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum, of the skip (empty where it is that of the sum), of ``h``, of the weight (empty where not
    asked for), and each program's shares of the gradients of the skip's bias and the norm's weight and bias, as far as
    they are there.
    """
    outs = _backward_fake(
        grad, total, h, index, row, weight, skip_bias, norm_weight, norm_bias, seed, silu, norm, centred, eps, dropout,
        drop_sum, fixed, need_residual, need_skip,
    )  # fmt: skip
    grad_sum, grad_skip, grad_h, grad_weight, share = outs
    tokens, d = grad.shape
    block_t, block_d, warps = sizes(d)
    if _rows_only(silu, norm, skip_bias, need_residual, need_skip):
        block_r = max(1, block_t // 2)  # enough loads in flight, and more programs at once
        rows_backward_kernel[(max(1, cdiv(h.shape[0], block_r)),)](
            grad,
            h,
            index,
            row,
            h if weight is None else weight,
            row if seed is None else seed,
            grad_h,
            grad_weight,
            tokens,
            h.shape[0],
            *_dropped(dropout),
            D=d,
            HAS_WEIGHT=weight is not None,
            DROP=seed is not None,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            BLOCK_T=ZEROS,
            num_warps=warps,
        )
        return outs
    each, programs = shares(tokens, d)
    backward_kernel[(programs,)](
        grad,
        total,
        h,
        row,
        h if weight is None else weight,
        h if norm_weight is None else norm_weight,
        row if seed is None else seed,
        grad_sum,
        grad_skip,
        grad_h,
        grad_weight,
        share,
        tokens,
        each,
        *_dropped(dropout),
        eps,
        D=d,
        HAS_WEIGHT=weight is not None,
        HAS_SKIP_BIAS=skip_bias is not None,
        SILU=silu,
        NORM=norm,
        CENTRED=centred,
        WEIGHT_STRIDE=stride(norm_weight),
        HAS_BIAS=norm_bias is not None,
        DROP=seed is not None,
        DROP_SUM=drop_sum,
        KEEP=silu or norm,
        STORE_SUM=grad_sum.numel() > 0,
        STORE_SKIP=grad_skip.numel() > 0,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return outs


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        index: Tensor,
        row: Tensor,
        weight: Tensor | None,
        skip: Tensor | None,
        skip_bias: Tensor | None,
        residual: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        options: Options,
        fixed: bool,
    ) -> Tensor:
        seed = draw_seed(h.device) if options.dropout > 0 else None
        out, total = forward(h, row, weight, skip, skip_bias, residual, norm_weight, norm_bias, seed, *options)
        ctx.save_for_backward(total, h, index, row, weight, skip_bias, norm_weight, norm_bias, seed)
        ctx.options, ctx.fixed = options, fixed
        ctx.dtypes = [None if each is None else each.dtype for each in (skip, residual)]
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, h, index, row, weight, skip_bias, norm_weight, norm_bias, seed = ctx.saved_tensors
        _, _, _, _, need_skip, _, need_residual, *_ = ctx.needs_input_grad
        grads = backward(
            grad.contiguous(), total, h, index, row, weight, skip_bias, norm_weight, norm_bias, seed, *ctx.options,
            ctx.fixed, need_residual, need_skip,
        )  # fmt: skip
        grad_sum, grad_skip, grad_h, grad_weight, share = grads
        by_skip_bias, by_norm_weight, by_norm_bias = totals(share, skip_bias, norm_weight, norm_bias)
        skip_dtype, residual_dtype = ctx.dtypes
        for_skip = grad_skip if grad_skip.numel() else grad_sum
        return (
            grad_h,
            None,
            None,
            None if weight is None else grad_weight.to(weight.dtype),
            for_skip.to(skip_dtype) if need_skip else None,
            by_skip_bias,
            grad_sum.to(residual_dtype) if need_residual else None,
            by_norm_weight,
            by_norm_bias,
            None,
            None,
        )


def _rows(x: Tensor | None, d: int) -> Tensor | None:
    return None if x is None else x.contiguous().view(-1, d)


def combine(h: Tensor, packed: Packed, terms: Terms, finish: Finish) -> Tensor:
    """See :func:`sma.ops.combine.combine`."""
    d, norm = h.shape[1], finish.norm
    options = Options(
        finish.activation == "silu",
        norm is not None,
        norm is not None and norm.centred,
        1.0 if norm is None else norm.eps,
        finish.dropout,
        finish.drop_sum,
    )
    flat: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
        h.contiguous(),
        packed.index,
        packed.row,
        None if terms.weight is None else terms.weight.contiguous().view(-1),
        _rows(terms.skip, d),
        terms.skip_bias,
        _rows(terms.residual, d),
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        options,
        packed.fixed,
    )
    return flat.view(*packed.shape, d)
