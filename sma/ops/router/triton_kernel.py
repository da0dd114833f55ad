"""router with one look at the tokens, forward and backward; README.md derives the gradient.

The width D is a constant of the kernels: rows of a width such as 616 are known to be aligned then, and are read in
vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.column_sums.triton_kernel import column_sums
from sma.ops.compress.triton_kernel import add_, take
from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.pack.triton_kernel import LEAST_COUNTED, count_block
from sma.ops.packed import Packed
from sma.ops.router import Compressor, Gate, Routed

FORWARD_T, FORWARD_D = LEAST_COUNTED, 128
WARPS = 4


@triton.jit
def _difference(pointer, m, at, step, mask, PAIRS: tl.constexpr):
    """What module m has at ``at``, in rows ``step`` apart: with two rows for a module, the second less the first."""
    if PAIRS:
        off = tl.load(pointer + 2 * m * step + at, mask=mask, other=0).to(tl.float32)
        return tl.load(pointer + (2 * m + 1) * step + at, mask=mask, other=0).to(tl.float32) - off
    return tl.load(pointer + m * step + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _temperature(log_temperature, temperature, LEARNED: tl.constexpr):
    if LEARNED:
        return tl.exp(tl.load(log_temperature).to(tl.float32)) * temperature
    return temperature


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    balance,
    log_temperature,
    valid,
    score,
    active,
    margin,
    seen,
    column,
    counts,
    tokens,
    length,
    temperature,
    threshold,
    D: tl.constexpr,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LEARNED: tl.constexpr,
    MASK: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``EACH`` tokens, and how many of them are active. ``MASK``: valid is None (0), a mask (1) or lengths (2)."""
    scale = _temperature(log_temperature, temperature, LEARNED)
    for m in tl.static_range(M):
        count = tl.zeros((BLOCK_T,), tl.int32)
        offset = tl.load(balance + m).to(tl.float32)
        for first in range(0, EACH, BLOCK_T):
            t = tl.program_id(0).to(tl.int64) * EACH + first + tl.arange(0, BLOCK_T)
            inside = t < tokens
            real = inside
            if MASK == 1:
                real = inside & (tl.load(valid + t, mask=inside, other=0) != 0)
            if MASK == 2:
                real = inside & (t % length < tl.load(valid + t // length, mask=inside, other=0))
            products = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # lanes add up once, at the end
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                w = _difference(weight, m, d, D, d < D, PAIRS)
                part = tl.load(x + t[:, None] * D + d, mask=real[:, None] & (d < D), other=0).to(tl.float32)
                products += part * w
            u = tl.where(real, tl.sum(products, 1) + _difference(bias, m, 0, 1, True, PAIRS), 0.0) + offset
            z = tl.div_rn(u, scale)
            e = tl.exp(-tl.abs(z))  # never too large
            s = tl.where(real, tl.div_rn(tl.where(z >= 0, 1.0, e), 1.0 + e), 0.0)
            chosen = real & ((s <= threshold) == 0)  # NaN is
            tl.store(margin + t * M + m, u, mask=inside)
            tl.store(score + t * M + m, s, mask=inside)
            tl.store(active + t * M + m, chosen, mask=inside)
            if MASK != 1 and m == 0:
                tl.store(seen + t, real, mask=inside)
                tl.store(column + t, t % length, mask=inside)
            count += chosen.to(tl.int32)
        tl.store(counts + m * tl.num_programs(0) + tl.program_id(0), tl.sum(count))


@triton.jit
def backward_kernel(
    x,
    weight,
    log_temperature,
    score,
    margin,
    grad_score,
    rows,
    row,
    grad_x,
    shares,
    tokens,
    temperature,
    D: tl.constexpr,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_THROUGH: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``grad_x = through + grad_margin W`` (in place when through is there; or with the ``rows`` of those tokens that
    have one in its place), and this program's share of the gradients of weight ``(C, D)``, bias ``(C,)`` and
    log_temperature, one behind the other.
    """
    program = tl.program_id(0)
    C: tl.constexpr = 2 * M if PAIRS else M
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    share = shares + program.to(tl.int64) * (C * D + C + 1)
    inverse = tl.div_rn(1.0, _temperature(log_temperature, temperature, LEARNED))
    by_log_temperature = tl.zeros((BLOCK_T,), tl.float32)
    for m in tl.static_range(M):
        if m > 0:
            tl.debug_barrier()  # what one thread wrote another may add to
        w = _difference(weight, m, d, D, d < D, PAIRS)
        by_weight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        by_bias = tl.zeros((BLOCK_T,), tl.float32)
        for first in range(0, TOKENS, BLOCK_T):
            t = program.to(tl.int64) * TOKENS + first + tl.arange(0, BLOCK_T)
            # All at once: none waits for another.
            if HAS_ROWS and m == 0:
                r = tl.load(row + t, mask=t < tokens, other=-1).to(tl.int64)
            real = tl.load(score + t * M + m, mask=t < tokens, other=0) != 0  # NaN is
            u = tl.load(margin + t * M + m, mask=t < tokens, other=0)
            g = tl.load(grad_score + t * M + m, mask=t < tokens, other=0)
            # s (1 - s), but not from s, of which little is left of 1 - s near 1.
            e = tl.exp(-tl.abs(u) * inverse)
            g = tl.where(real, g * inverse * tl.div_rn(e, (1.0 + e) * (1.0 + e)), 0.0)
            # Rows without a gradient are not even looked at.
            touched = g != 0
            cells = touched[:, None] & (d < D)
            place = t[:, None] * D + d
            value = tl.load(x + place, mask=cells, other=0).to(tl.float32)
            by_weight += value * g[:, None]
            by_bias += g
            by_log_temperature -= tl.where(touched, g * u, 0.0)
            new = g[:, None] * w
            if HAS_THROUGH or m > 0:
                new += tl.load(grad_x + place, mask=cells, other=0).to(tl.float32)
                tl.store(grad_x + place, new.to(grad_x.dtype.element_ty), mask=cells)
            else:
                if HAS_ROWS:
                    mask = (r >= 0)[:, None] & (d < D)
                    new += tl.load(rows + r[:, None] * D + d, mask=mask, other=0).to(tl.float32)
                tl.store(grad_x + place, new.to(grad_x.dtype.element_ty), mask=(t < tokens)[:, None] & (d < D))
        weights = tl.sum(by_weight, 0)
        biases = tl.sum(by_bias)
        if PAIRS:
            tl.store(share + 2 * m * D + d, -weights, mask=d < D)
            tl.store(share + (2 * m + 1) * D + d, weights, mask=d < D)
        else:
            tl.store(share + m * D + d, weights, mask=d < D)
        if tl.program_id(1) == 0:
            if PAIRS:
                tl.store(share + C * D + 2 * m, -biases)
                tl.store(share + C * D + 2 * m + 1, biases)
            else:
                tl.store(share + C * D + m, biases)
    if tl.program_id(1) == 0:
        tl.store(share + C * D + C, tl.sum(by_log_temperature))


def backward_sizes(d: int) -> tuple[int, int]:
    """Tokens and features of a tile of the backward pass: whole rows where they fill it, else squares."""
    return (8, 512) if d % 512 == 0 else (64, 64)


def tokens_per_program(tokens: int) -> int:
    """Over how many a program of the backward pass adds up: about a thousand programs, if there are tokens enough."""
    each: int = next_power_of_2(cdiv(tokens, 1024))
    return max(64, min(each, 1024))


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    balance: Tensor,
    log_temperature: Tensor | None,
    valid: Tensor | None,
    lengths: Tensor | None,
    temperature: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, length), modules = x.shape[:2], balance.numel()
    score = x.new_empty(batch, length, modules, dtype=torch.float32)
    tokens, made = batch * length, (batch, length) if valid is None else (0, 0)
    return (
        score,
        torch.empty_like(score, dtype=torch.bool),
        torch.empty_like(score),
        x.new_empty(made, dtype=torch.bool),
        x.new_empty(made, dtype=torch.int64),
        x.new_empty(modules, cdiv(tokens, count_block(tokens)), dtype=torch.int32),
    )


@kernel("router_forward", fake=_forward_fake)
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    balance: Tensor,
    log_temperature: Tensor | None,
    valid: Tensor | None,
    lengths: Tensor | None,
    temperature: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, decision, margin, the mask of the real tokens and the columns (both empty if a mask was given), and counts
    of contiguous inputs.
    """
    outs = _forward_fake(x, weight, bias, balance, log_temperature, valid, lengths, temperature, threshold)
    score, active, margin, seen, column, counts = outs
    given = valid if lengths is None else lengths
    forward_kernel[(counts.shape[1],)](
        x,
        weight,
        bias,
        balance,
        x if log_temperature is None else log_temperature,
        x if given is None else given,
        score,
        active,
        margin,
        seen,
        column,
        counts,
        x.shape[0] * x.shape[1],
        x.shape[1],
        temperature,
        threshold,
        D=x.shape[2],
        M=balance.numel(),
        PAIRS=weight.shape[0] > balance.numel(),
        LEARNED=log_temperature is not None,
        MASK=0 if given is None else 1 if lengths is None else 2,
        EACH=count_block(x.shape[0] * x.shape[1]),
        BLOCK_T=FORWARD_T,
        BLOCK_D=FORWARD_D,
        num_warps=WARPS,
    )
    return outs


def _sums_dtype(weight: Tensor, log_temperature: Tensor | None) -> torch.dtype:
    """Of the gradients of weight, bias and log_temperature, which come out in one row."""
    return weight.dtype if log_temperature is None or log_temperature.dtype == weight.dtype else torch.float32


def _backward_fake(
    x: Tensor,
    weight: Tensor,
    log_temperature: Tensor | None,
    score: Tensor,
    margin: Tensor,
    grad_score: Tensor,
    through: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    dtype = _sums_dtype(weight, log_temperature)
    return torch.empty_like(x), weight.new_empty(weight.numel() + weight.shape[0] + 1, dtype=dtype)


@kernel("router_backward", fake=_backward_fake)
def backward(
    x: Tensor,
    weight: Tensor,
    log_temperature: Tensor | None,
    score: Tensor,
    margin: Tensor,
    grad_score: Tensor,
    through: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``x``, and those of weight, bias and log_temperature in a row; ``through`` is left alone."""
    own = None if through is None else through.clone()
    return _backward(x, weight, log_temperature, score, margin, grad_score, own, temperature)


def _backward(
    x: Tensor,
    weight: Tensor,
    log_temperature: Tensor | None,
    score: Tensor,
    margin: Tensor,
    grad_score: Tensor,
    through: Tensor | None,
    temperature: float,
    rows: Tensor | None = None,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same; ``through`` becomes the gradient of x, or ``rows (K, D)`` arrived for the tokens in ``row (B L,)``."""
    grad_x = torch.empty_like(x) if through is None else through
    tokens, (outputs, d), modules = x.shape[0] * x.shape[1], weight.shape, score.shape[2]
    each = tokens_per_program(tokens)
    programs = cdiv(tokens, each)
    shares = x.new_empty(programs, outputs * d + outputs + 1, dtype=torch.float32)
    block_t, block_d = backward_sizes(d)
    backward_kernel[(programs, cdiv(d, block_d))](
        x,
        weight,
        x if log_temperature is None else log_temperature,
        score,
        margin,
        grad_score,
        x if rows is None else rows,
        x if row is None else row,
        grad_x,
        shares,
        tokens,
        temperature,
        D=d,
        M=modules,
        PAIRS=outputs > modules,
        LEARNED=log_temperature is not None,
        HAS_THROUGH=through is not None,
        HAS_ROWS=rows is not None,
        TOKENS=each,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=WARPS,
    )
    return grad_x, column_sums(shares, _sums_dtype(weight, log_temperature))


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        balance: Tensor,
        log_temperature: Tensor | None,
        valid: Tensor | None,
        lengths: Tensor | None,
        temperature: float,
        threshold: float,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        score, active, margin, seen, column, counts = forward(
            x, weight, bias, balance, log_temperature, valid, lengths, temperature, threshold
        )
        ctx.save_for_backward(x, weight, log_temperature, score, margin)
        ctx.mark_non_differentiable(active, margin, seen, column, counts)
        ctx.temperature = temperature
        return x.view_as(x), score, active, margin, seen, column, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, through: Tensor | None, grad_score: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, log_temperature, score, margin = ctx.saved_tensors
        if grad_score is None:
            return through, *_no_gradients(weight, log_temperature), *([None] * 4)
        run = backward if torch.compiler.is_compiling() else _backward
        through = None if through is None else through.contiguous()
        grad_x, sums = run(x, weight, log_temperature, score, margin, grad_score.contiguous(), through, ctx.temperature)
        return grad_x, *_gradients(sums, weight, log_temperature), *([None] * 4)


def _gradients(sums: Tensor, weight: Tensor, log_temperature: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of weight, bias, balance and log_temperature."""
    sizes = (weight.numel(), weight.shape[0], 1)
    by_weight, by_bias, by_temperature = sums.split_with_sizes(sizes)
    by_weight, by_bias = by_weight.view(weight.shape).to(weight.dtype), by_bias.to(weight.dtype)
    if log_temperature is None:
        return by_weight, by_bias, None, None
    return by_weight, by_bias, None, by_temperature.view(log_temperature.shape).to(log_temperature.dtype)


def _no_gradients(weight: Tensor, log_temperature: Tensor | None) -> tuple[Tensor | None, ...]:
    by_temperature = None if log_temperature is None else torch.zeros_like(log_temperature)
    return torch.zeros_like(weight), weight.new_zeros(weight.shape[0]), None, by_temperature


class _RoutedCompress(torch.autograd.Function):
    """compress of the tokens whose scores are known, so that one kernel writes what both give to the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        log_temperature: Tensor | None,
        score: Tensor,
        margin: Tensor,
        index: Tensor,
        row: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, log_temperature, score, margin, index, row)
        ctx.temperature = temperature
        return take(x.view(row.numel(), -1), index), x.view_as(x), score.view_as(score)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, through: Tensor | None, grad_score: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, log_temperature, score, margin, index, row = ctx.saved_tensors
        through = None if through is None else through.contiguous()
        rows = None if grad is None else grad.contiguous()
        if rows is not None and through is not None:
            add_(through.view(row.numel(), -1), index, rows)
            rows = None
        nothing: list[None] = [None] * 5
        if grad_score is None:
            grad_x = through if rows is None else take(rows, row).view(x.shape)
            by_weight, by_bias, _, by_temperature = _no_gradients(weight, log_temperature)
        else:
            scored = score, margin, grad_score.contiguous()
            grad_x, sums = _backward(x, weight, log_temperature, *scored, through, ctx.temperature, rows, row)
            by_weight, by_bias, _, by_temperature = _gradients(sums, weight, log_temperature)
        return grad_x, by_weight, by_bias, by_temperature, *nothing


def router(x: Tensor, weight: Tensor, bias: Tensor, gate: Gate, valid: Tensor | None, lengths: Tensor | None) -> Routed:
    """See :func:`sma.ops.router.router`."""
    valid, lengths = (None if each is None else each.contiguous() for each in (valid, lengths))
    balance, log_temperature, temperature, threshold = gate
    through, score, active, margin, seen, column, counts = _Router.apply(
        x.contiguous(), weight.contiguous(), bias.contiguous(), balance, log_temperature, valid, lengths, temperature,
        threshold,
    )  # fmt: skip
    if valid is not None:
        return Routed(through, score, active, margin, valid, None, counts)
    return Routed(through, score, active, margin, seen, column, counts)


def routed_compress(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Gate, valid: Tensor | None, lengths: Tensor | None
) -> tuple[Routed, Compressor]:
    """See :func:`sma.ops.router.routed_compress`."""
    x = x.contiguous()
    with torch.no_grad():
        routed = router(x, weight, bias, gate, valid, lengths)

    def compress(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        out: tuple[Tensor, Tensor, Tensor] = _RoutedCompress.apply(
            x, weight.contiguous(), bias, gate.log_temperature, routed.score, routed.margin, packed.index, packed.row,
            gate.temperature,
        )  # fmt: skip
        return out

    return routed, compress
