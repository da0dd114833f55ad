"""combine in one kernel forward and one backward, which takes the active rows alone where nothing else has a gradient.

Only the sum in front of the activation is kept for the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.combine import Plan, leading
from sma.ops.kernel import cdiv, draw_seed, kernel
from sma.ops.packed import Packed
from sma.ops.row_norm import RowNorm
from sma.ops.row_norm.triton_kernel import affine, scale, shares, sizes, stride, totals, unscale

PARTS = 1 << 16
"""Probabilities of dropout are multiples of one part."""
ZEROS = 256
"""So many gradients of weights a program sets to zero at a time."""


@triton.jit
def _kept(seed, t, dropped, BLOCK_D: tl.constexpr):
    """Which numbers of tokens ``t`` are kept if ``dropped`` parts are not, always the same for a seed.

    Eight at a time, of 16 bits each, from Philox with 7 rounds, the fewest that pass every test of its authors (Salmon
    et al., 2011).
    """
    eighth = t[:, None] * (BLOCK_D // 8) + tl.arange(0, BLOCK_D // 8)[None, :]
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed), eighth, n_rounds=7)
    words = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3)).to(tl.uint32, bitcast=True)
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= dropped


@triton.jit
def exp(x):
    """e^x to one unit in the last place: that of the hardware loses what the product with log2(e) is rounded by."""
    x = tl.minimum(tl.maximum(x, -100.0), 88.0)
    high = x * 1.44269502
    low = tl.fma(x, 1.44269502, -high) + x * 1.92596303e-8
    return tl.exp2(high) * (1.0 + low * 0.693147182)


@triton.jit
def silu(x):
    return tl.div_rn(x, 1.0 + exp(-x))


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    """EXACT as in :func:`~sma.ops.row_norm.triton_kernel.scale`."""
    if EXACT:
        return tl.div_rn(1.0, 1.0 + exp(-x))
    return 1.0 / (1.0 + tl.exp2(x * -1.44269504))


@triton.jit
def forward_kernel(
    h,
    row,
    weight,
    skip,
    skip_bias,
    residual,
    norm_weight,
    norm_bias,
    seed,
    total,
    out,
    tokens,
    dropped,
    scaled_up,
    norm_eps,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_SKIP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,
    DROP_SUM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of tokens, each with all of its features."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (t < tokens)[:, None] & (d < D)
    place = t[:, None] * D + d
    r = tl.load(row + t, mask=t < tokens, other=-1).to(tl.int64)
    active = r >= 0
    s = tl.load(h + r[:, None] * D + d, mask=active[:, None] & (d < D), other=0).to(tl.float32)
    if HAS_WEIGHT:
        s = s * tl.load(weight + t, mask=active, other=0).to(tl.float32)[:, None]
    if DROP and not DROP_SUM:
        s = tl.where(_kept(seed, t, dropped, BLOCK_D), s * scaled_up, 0.0)
    if HAS_SKIP:
        s += tl.load(skip + place, mask=inside, other=0).to(tl.float32)
    if HAS_SKIP_BIAS:
        s += tl.load(skip_bias + d, mask=d < D, other=0).to(tl.float32)
    if DROP and DROP_SUM:
        s = tl.where(_kept(seed, t, dropped, BLOCK_D), s * scaled_up, 0.0)
    if HAS_RESIDUAL:
        s += tl.load(residual + place, mask=inside, other=0).to(tl.float32)
    if KEEP:
        tl.store(total + place, s.to(total.dtype.element_ty), mask=inside)
        s = s.to(total.dtype.element_ty).to(tl.float32)  # the backward knows the rounded sum: differentiate just that
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    if SILU:
        s = silu(s) if EXACT else s * _sigmoid(s, EXACT)
    if NORM:
        s, _ = scale(tl.where(inside, s, 0.0), norm_eps, inside, D, CENTRED, EXACT)
        s = affine(s, norm_weight, norm_bias, d, D, WEIGHT_STRIDE, HAS_BIAS)
    tl.store(out + place, s.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad,
    total,
    h,
    row,
    weight,
    norm_weight,
    seed,
    grad_residual,
    grad_skip,
    grad_h,
    grad_weight,
    shares,
    tokens,
    blocks,
    dropped,
    scaled_up,
    norm_eps,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SKIP_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,
    DROP_SUM: tl.constexpr,
    KEEP: tl.constexpr,
    STORE_SUM: tl.constexpr,
    STORE_SKIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Blocks of tokens one after the other, and their share of the gradients of the norm."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)[None, :]
    sum_weight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # over the blocks; over their tokens at the end
    sum_bias = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    sum_skip = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    EXACT: tl.constexpr = grad.dtype.element_ty == tl.float32
    for block in range(blocks):
        t = (program.to(tl.int64) * blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < tokens)[:, None] & (d < D)
        place = t[:, None] * D + d
        g = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
        if KEEP:
            s = tl.load(total + place, mask=inside, other=0).to(tl.float32)
            if SILU:
                gate = _sigmoid(s, EXACT)
            if NORM:
                y = s
                if SILU:
                    y = silu(s) if EXACT else s * gate
                scaled, rstd = scale(tl.where(inside, y, 0.0), norm_eps, inside, D, CENTRED, EXACT)
                if HAS_BIAS:
                    sum_bias += g
                if WEIGHT_STRIDE >= 0:
                    sum_weight += g * scaled
                    g = g * tl.load(norm_weight + d * WEIGHT_STRIDE, mask=d < D, other=0).to(tl.float32)
                g = unscale(g, scaled, rstd, inside, D, CENTRED)
            if SILU:
                g = g * gate * (1.0 + s * (1.0 - gate))
        if STORE_SUM:
            tl.store(grad_residual + place, g.to(grad_residual.dtype.element_ty), mask=inside)
        if DROP and DROP_SUM:
            g = tl.where(_kept(seed, t, dropped, BLOCK_D), g * scaled_up, 0.0)
        if HAS_SKIP_BIAS:
            sum_skip += g
        if STORE_SKIP:
            tl.store(grad_skip + place, g.to(grad_skip.dtype.element_ty), mask=inside)
        if DROP and not DROP_SUM:
            g = tl.where(_kept(seed, t, dropped, BLOCK_D), g * scaled_up, 0.0)
        r = tl.load(row + t, mask=t < tokens, other=-1).to(tl.int64)
        cells = (r >= 0)[:, None] & (d < D)
        if HAS_WEIGHT:
            w = tl.load(weight + t, mask=r >= 0, other=0).to(tl.float32)
            value = tl.load(h + r[:, None] * D + d, mask=cells, other=0).to(tl.float32)
            tl.store(grad_weight + t, tl.sum(tl.where(cells, g * value, 0.0), 1), mask=t < tokens)
            g = g * w[:, None]
        tl.store(grad_h + r[:, None] * D + d, g.to(grad_h.dtype.element_ty), mask=cells)
    share = shares + program * D + d
    if HAS_SKIP_BIAS:
        tl.store(share, tl.sum(sum_skip, 0)[None, :], mask=d < D)
        share += tl.num_programs(0) * D
    if NORM and WEIGHT_STRIDE >= 0:
        tl.store(share, tl.sum(sum_weight, 0)[None, :], mask=d < D)
        share += tl.num_programs(0) * D
    if NORM and HAS_BIAS:
        tl.store(share, tl.sum(sum_bias, 0)[None, :], mask=d < D)


@triton.jit
def rows_backward_kernel(
    grad,
    h,
    index,
    row,
    weight,
    seed,
    grad_h,
    grad_weight,
    tokens,
    rows,
    dropped,
    scaled_up,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Where the rows alone have a gradient, and their weights: a block of rows, and zeros for what is not active."""
    program = tl.program_id(0).to(tl.int64)
    r = program * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)[None, :]
    t = tl.load(index + r, mask=r < rows, other=-1)
    there = (t >= 0) & (t < tokens)
    cells = there[:, None] & (d < D)
    g = tl.load(grad + t[:, None] * D + d, mask=cells, other=0).to(tl.float32)
    if DROP:
        g = tl.where(_kept(seed, t, dropped, BLOCK_D), g * scaled_up, 0.0)
    if HAS_WEIGHT:
        value = tl.load(h + r[:, None] * D + d, mask=cells, other=0).to(tl.float32)
        tl.store(grad_weight + t, tl.sum(g * value, 1), mask=there)
        g = g * tl.load(weight + t, mask=there, other=0).to(tl.float32)[:, None]
        for start in range(program * BLOCK_T, tokens, tl.num_programs(0) * BLOCK_T):
            other = start + tl.arange(0, BLOCK_T)
            inactive = tl.load(row + other, mask=other < tokens, other=0) < 0
            tl.store(grad_weight + other, tl.zeros((BLOCK_T,), tl.float32), mask=inactive)
    tl.store(grad_h + r[:, None] * D + d, g.to(grad_h.dtype.element_ty), mask=(r < rows)[:, None] & (d < D))


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
    out = h.new_empty(row.numel(), h.shape[1], dtype=leading(h, skip, residual).dtype)
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
        block_r = max(1, block_t // 2)  # enough to wait for, and more programs at once
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


def combine(
    h: Tensor,
    packed: Packed,
    weight: Tensor | None,
    skip: Tensor | None,
    skip_bias: Tensor | None,
    residual: Tensor | None,
    norm: RowNorm | None,
    plan: Plan,
) -> Tensor:
    """See :func:`sma.ops.combine.combine`."""
    d = h.shape[1]
    options = Options(
        plan.activation == "silu",
        norm is not None,
        norm is not None and norm.centred,
        1.0 if norm is None else norm.eps,
        plan.dropout,
        plan.drop_sum,
    )
    flat: Tensor = _Combine.apply(
        h.contiguous(),
        packed.index,
        packed.row,
        None if weight is None else weight.contiguous().view(-1),
        _rows(skip, d),
        skip_bias,
        _rows(residual, d),
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        options,
        packed.fixed,
    )
    out: Tensor = flat.view(*packed.shape, d)
    return out
