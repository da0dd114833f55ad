"""Products with overlapping spans of keys, and moves of rows, each with a gradient that is quick and deterministic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.transforms import transformed
from sma_modules.ops.window_attention.tiling import overlap_add, spans


class _Pick(torch.autograd.Function):
    """``x[rows]`` for rows that are all different; autograd alone would add up the gradient, much slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.n_rows = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return place(grads[0], rows, ctx.n_rows), None


class _Scores(torch.autograd.Function):
    """``bias + scale * blocks @ keys^T``, ``(n, block, span)``; the keys are overlapping spans of a buffer."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, blocks: Tensor, buffer: Tensor, scale: float, span: int, stride: int) -> Tensor:
        ctx.save_for_backward(blocks, buffer)
        ctx.sizes, ctx.scale, ctx.own_bias = (span, stride), scale, bias.dim() == 3
        keys = spans(buffer, blocks.shape[0], span, stride)
        return torch.baddbmm(bias.expand(blocks.shape[0], -1, -1), blocks, keys.transpose(1, 2), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (blocks, buffer), (span, stride) = ctx.saved_tensors, ctx.sizes
        grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_bias = grads[0] if ctx.own_bias else grads[0].sum(0)
        grad = grads[0] * ctx.scale
        grad_blocks = torch.bmm(grad, spans(buffer, blocks.shape[0], span, stride))
        return grad_bias, grad_blocks, overlap_add(grad, blocks, buffer.shape[0], stride), None, None, None


class _Values(torch.autograd.Function):
    """``weights @ values``, ``(n, block, h)``; the values are overlapping spans of a buffer."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, buffer: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(weights, buffer)
        ctx.stride = stride
        return torch.bmm(weights, spans(buffer, weights.shape[0], weights.shape[2], stride))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, buffer = ctx.saved_tensors
        taken = spans(buffer, weights.shape[0], weights.shape[2], ctx.stride)
        grad_weights = torch.bmm(grads[0], taken.transpose(1, 2))
        return grad_weights, overlap_add(weights, grads[0], buffer.shape[0], ctx.stride), None


class _Lookup(torch.autograd.Function):
    """``table[index]`` with a gradient that is quick on a CPU and deterministic everywhere."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.entries = table.numel()
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        grad = grads[0]
        if index.device.type == "cpu":  # one thread, in order
            return grad.new_zeros(ctx.entries).scatter_add_(0, index, grad), None
        if grad.dtype == torch.float64:  # in order of a sort: exact, but slow where entries repeat
            return grad.new_zeros(ctx.entries).index_put_((index,), grad, accumulate=True), None
        return fixed_point_sums(grad, index, ctx.entries), None


def fixed_point_sums(x: Tensor, index: Tensor, entries: int) -> Tensor:
    """Sums ``(entries,)`` of ``x (n,)`` by ``index (n,)``, the same bits in whatever order threads add.

    Integer additions commute exactly, floating-point ones do not. The common scale leaves ``62 - log2(n)`` bits below
    the largest value, more than the 24 of float32 for any n that fits in memory. NaN or Inf anywhere makes every sum
    NaN.
    """
    largest = x.abs().amax().double() if x.numel() else x.new_zeros((), dtype=torch.float64)
    bits = 62 - (largest.clamp(min=1e-300) * max(x.numel(), 1)).log2()
    scale = torch.exp2(bits.floor().clamp(-1000, 1000))
    units = (x.double() * scale).round().nan_to_num().to(torch.int64)
    sums = torch.zeros(entries, dtype=torch.int64, device=x.device).index_add_(0, index, units)
    return torch.where(largest.isfinite(), sums / scale, torch.nan).to(x.dtype)


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` for rows that are all different."""
    if transformed():
        return x.index_select(0, rows)
    out: Tensor = _Pick.apply(x, rows)  # type: ignore[no-untyped-call]
    return out


def scores(bias: Tensor, blocks: Tensor, buffer: Tensor, scale: float, span: int, stride: int) -> Tensor:
    """``bias + scale * blocks @ keys^T``, ``(n, block, span)``; the keys are overlapping spans of a buffer."""
    if transformed():
        keys = spans(buffer, blocks.shape[0], span, stride)
        return bias + scale * torch.bmm(blocks, keys.transpose(1, 2))
    out: Tensor = _Scores.apply(bias, blocks, buffer, scale, span, stride)  # type: ignore[no-untyped-call]
    return out


def values(weights: Tensor, buffer: Tensor, stride: int) -> Tensor:
    """``weights @ values``, ``(n, block, h)``; the values are overlapping spans of a buffer."""
    if transformed():
        return torch.bmm(weights, spans(buffer, weights.shape[0], weights.shape[2], stride))
    out: Tensor = _Values.apply(weights, buffer, stride)  # type: ignore[no-untyped-call]
    return out


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for ``table (E,)`` and an index of any shape."""
    if transformed():
        return table.index_select(0, index.reshape(-1)).view(index.shape)
    flat: Tensor = _Lookup.apply(table, index.reshape(-1))  # type: ignore[no-untyped-call]
    return flat.view(index.shape)


def place(x: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Zeros ``(n_rows, f)`` with ``x (R, f)`` at ``rows``, which are all different except for a spare row."""
    out = x.new_zeros(n_rows, *x.shape[1:])
    # A sum onto zeros is the same, and twice as fast on a CPU. Other devices add in any order, or not in 16 bits.
    sums = x.device.type == "cpu" and not torch.compiler.is_exporting()
    return out.index_add_(0, rows, x.contiguous()) if sums else out.index_copy_(0, rows, x)
