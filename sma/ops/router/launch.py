"""Launches of the kernels of router as operators, its gradient, and one backward pass with compress."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sma.ops.column_sums.launch import column_sums
from sma.ops.compress.launch import add_, take
from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.pack.launch import LEAST_COUNTED, count_block
from sma.ops.packed import Packed
from sma.ops.router.triton_kernel import backward_kernel, forward_kernel
from sma.ops.router.types import Compressor, Gate, Routed
from sma.transforms import once_differentiable

FORWARD_T, FORWARD_D = LEAST_COUNTED, 128
WARPS = 4


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
    return _backward(_Saved(x, weight, log_temperature, score, margin, temperature), grad_score, own)


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass."""

    x: Tensor
    weight: Tensor
    log_temperature: Tensor | None
    score: Tensor
    margin: Tensor
    temperature: float


def _backward(
    saved: _Saved,
    grad_score: Tensor,
    through: Tensor | None,
    rows: Tensor | None = None,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same; ``through`` becomes the gradient of x, or ``rows (K, D)`` arrived for the tokens in ``row (B L,)``."""
    x, weight, log_temperature, score, margin, temperature = saved
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
        grad_score, through = grad_score.contiguous(), None if through is None else through.contiguous()
        if torch.compiler.is_compiling():
            grad_x, sums = backward(x, weight, log_temperature, score, margin, grad_score, through, ctx.temperature)
        else:
            saved = _Saved(x, weight, log_temperature, score, margin, ctx.temperature)
            grad_x, sums = _backward(saved, grad_score, through)
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
            saved = _Saved(x, weight, log_temperature, score, margin, ctx.temperature)
            grad_x, sums = _backward(saved, grad_score.contiguous(), through, rows, row)
            by_weight, by_bias, _, by_temperature = _gradients(sums, weight, log_temperature)
        return grad_x, by_weight, by_bias, by_temperature, *nothing


def router(x: Tensor, weight: Tensor, bias: Tensor, gate: Gate, valid: Tensor | None, lengths: Tensor | None) -> Routed:
    """See :func:`sma.ops.router.router`."""
    valid, lengths = (None if each is None else each.contiguous() for each in (valid, lengths))
    balance, log_temperature, temperature, threshold = gate
    through, score, active, margin, seen, column, counts = _Router.apply(  # type: ignore[no-untyped-call]
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
        out: tuple[Tensor, Tensor, Tensor] = _RoutedCompress.apply(  # type: ignore[no-untyped-call]
            x, weight.contiguous(), bias, gate.log_temperature, routed.score, routed.margin, packed.index, packed.row,
            gate.temperature,
        )  # fmt: skip
        return out

    return routed, compress
