"""Window attention with batched matrix products over blocks of queries and overlapping spans of keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.dropout import dropout
from sma.ops.backend import concrete
from sma_modules.ops.window_attention.rule import LAPLACE_DEVIATION, LAPLACE_MEAN, Layout, Rule
from sma_modules.ops.window_attention.tiling import Tiling, overlap_add, spans, tile

HIDDEN = -1e30
"""Added to scores that must not count: below every score, and twice of it is still finite in float32."""


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
        values = spans(buffer, weights.shape[0], weights.shape[2], ctx.stride)
        grad_weights = torch.bmm(grads[0], values.transpose(1, 2))
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
    room = 62 - (largest.clamp(min=1e-300) * max(x.numel(), 1)).log2()
    scale = torch.exp2(room.floor().clamp(-1000, 1000))
    units = (x.double() * scale).round().nan_to_num().to(torch.int64)
    sums = torch.zeros(entries, dtype=torch.int64, device=x.device).index_add_(0, index, units)
    return torch.where(largest.isfinite(), sums / scale, torch.nan).to(x.dtype)


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, all rows different."""
    return _Pick.apply(x, rows)  # type: ignore[no-any-return,no-untyped-call]


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` for ``table (E,)`` and an index of any shape."""
    flat: Tensor = _Lookup.apply(table, index.reshape(-1))  # type: ignore[no-untyped-call]
    return flat.view(index.shape)


def place(x: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Zeros ``(n_rows, f)`` with ``x (R, f)`` at ``rows``, which are all different (but for those nobody reads)."""
    out = x.new_zeros(n_rows, *x.shape[1:])
    # A sum onto zeros is the same, and on a CPU twice as fast; elsewhere sums are in no order, or not there in 16 bits.
    sums = x.device.type == "cpu" and not torch.compiler.is_exporting()
    return out.index_add_(0, rows, x.contiguous()) if sums else out.index_copy_(0, rows, x)


def window_attention_eager(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, table: Tensor | None, layout: Layout, rule: Rule
) -> Tensor:
    """The default backend; never holds a tensor of length times length when there is a window or a chunk."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = _attention(q, k, v, table, layout, rule)
    return out if gate is None else out * gate


def _attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, layout: Layout, rule: Rule) -> Tensor:
    if not q.shape[0] or not k.shape[0] or not q.shape[1]:
        return _without_keys(q, k, v, table)
    if rule.reach is None and rule.activation == "softmax" and rule.bias == "none" and layout.aligned:
        return _fused(q, k, v, layout, rule)
    # A look at all values is cheap on a CPU; elsewhere it would wait for the device, and the safe tiling is taken.
    finite = concrete(k) and bool((k.detach().sum() + v.detach().sum()).isfinite())
    tiling = tile(q.shape[0], k.shape[0], layout, rule, finite)
    scale = q.shape[-1] ** -0.5
    count = None
    if rule.activation != "softmax":
        scale = 1.0 if rule.divisor is None else 1.0 / rule.divisor
    if not layout.aligned or (rule.activation != "softmax" and rule.divisor is None):
        count = _visible_count(tiling, layout, rule)
        if rule.activation != "softmax" and rule.divisor is None:
            q = q / count.clamp(min=1)[:, None, None].to(q.dtype)
    out = _attend(q, k, v, scale, tiling, layout, rule, table)
    return out if layout.aligned or count is None else torch.where(count[:, None, None] > 0, out, 0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tiling: Tiling, layout: Layout, rule: Rule, table: Tensor | None
) -> Tensor:
    """Place rows in blocks and spans, attend, pick the rows of the queries. Those without keys get anything finite."""
    heads, width = q.shape[1:]
    n, block = heads * tiling.n_blocks, tiling.block
    if (
        q.dtype != torch.float64
    ):  # scores are computed in float32: rounding them would cost more accuracy than all the rest
        q, k = q.float(), k.float()
    q_rows = tiling.spread(tiling.q_rows, heads, tiling.n_blocks * block)
    k_rows = tiling.spread(tiling.k_rows, heads, tiling.n_blocks * tiling.stride)
    blocks = place(q.reshape(-1, width), q_rows, n * block).view(n, block, width)
    keys, values = (place(x.reshape(-1, x.shape[-1]), k_rows, tiling.key_rows(heads)) for x in (k, v))
    scores = _scores(blocks, keys, scale, *_biases(tiling, layout, rule, table, q), tiling)
    weights = dropout(_activate(scores, rule), rule.dropout)
    out: Tensor = _Values.apply(weights.to(v.dtype), values, tiling.stride)  # type: ignore[no-untyped-call]
    return pick(out.view(n * block, -1), q_rows).view(*q.shape[:2], -1)


def _fused(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """Unbounded softmax attention without biases, by the kernel of PyTorch, on padded sequences."""
    n_queries, heads = q.shape[:2]
    tiling = tile(n_queries, n_queries, layout, rule, finite=True)
    q, k, v = (
        place(x.reshape(x.shape[0], -1), tiling.q_rows, tiling.n_blocks * tiling.block)
        .view(tiling.n_blocks, tiling.block, *x.shape[1:])
        .transpose(1, 2)
        for x in (q, k, v)
    )
    mask = None
    if not rule.causal:  # a causal query sees no padding: that comes after it
        empty = torch.arange(tiling.block, device=q.device) >= layout.k_cu.diff()[:, None]
        mask = torch.zeros_like(empty, dtype=q.dtype).masked_fill_(empty, torch.finfo(q.dtype).min / 2)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rule.dropout, is_causal=rule.causal)
    out = out.transpose(1, 2).reshape(tiling.n_blocks * tiling.block, -1)
    return pick(out, tiling.q_rows).view(n_queries, heads, -1)


def _without_keys(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
    """Zeros that hang on the graph of every input."""
    graph = (q[:0].sum() + k[:0].sum() + (0 if table is None else table[:0].sum())).to(v.dtype) + v[:0].sum()
    return v.new_zeros(q.shape[0], *v.shape[1:]) + graph


def _activate(scores: Tensor, rule: Rule) -> Tensor:
    if rule.activation == "softmax":
        return torch.softmax(scores, -1)
    if rule.activation == "relu2":
        return torch.relu(scores).square()
    return 0.5 * (1 + torch.erf((scores - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2))))


def _scores(blocks: Tensor, keys: Tensor, scale: float, bias: Tensor, mask: Tensor | None, tiling: Tiling) -> Tensor:
    """``(heads * n_blocks, block, span)`` in float32 at least.

    Args:
        keys: the buffer of keys.
        bias: ``(block, span)`` or ``(n_blocks, block, span)``, hidden pairs included.
        mask: ``(n_blocks, 1 or block, span)``, added as well, in place.
    """
    heads = blocks.shape[0] // tiling.n_blocks
    if bias.dim() == 3 and heads > 1:
        bias = bias.repeat(heads, 1, 1)
    scores: Tensor = _Scores.apply(bias, blocks, keys, scale, tiling.span, tiling.stride)  # type: ignore[no-untyped-call]
    if mask is None:
        return scores
    # In place: adding a constant needs neither operand for its gradient, and scores are the largest tensor here.
    return scores.add_(mask if heads == 1 else mask.repeat(heads, 1, 1))


def _biases(
    tiling: Tiling, layout: Layout, rule: Rule, table: Tensor | None, q: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What is added to products: a differentiable bias, window included, and a mask, as :func:`_scores` takes them."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    device = q.device
    distance = (
        torch.arange(tiling.span, device=device) - tiling.left - torch.arange(tiling.block, device=device)[:, None]
    )
    outside = distance > 0 if rule.causal else torch.zeros_like(distance, dtype=torch.bool)
    if rule.window is not None:
        outside = outside | (distance.abs() > rule.window)
    window = torch.zeros(distance.shape, dtype=wide, device=device).masked_fill(outside, HIDDEN)
    if table is None or rule.bias == "none":
        bias = window
    elif rule.bias == "local":
        assert rule.window is not None
        index = (distance + 4 * rule.window - 1).clamp(0, table.numel() - 1)
        bias = lookup(table.to(wide), index) + window
    else:
        bias = lookup(table.to(wide), _original_index(tiling, layout, table.numel())).add_(window)
    return bias, _mask(tiling, layout, rule, wide)


def _original_index(tiling: Tiling, layout: Layout, entries: int) -> Tensor:
    """``(n_blocks, block, span)`` index into the table, from original positions."""
    assert layout.q_position is not None
    assert layout.k_position is not None
    last = (entries - 1) // 2
    t_q, t_k = _per_slot(tiling, layout.q_position, layout.k_position + last, 0)
    return (t_k[:, None, :] - t_q[:, :, None]).clamp_(0, 2 * last)


def _per_slot(tiling: Tiling, q_value: Tensor, k_value: Tensor, empty: int) -> tuple[Tensor, Tensor]:
    """Numbers of queries ``(n_blocks, block)`` and keys ``(n_blocks, span)``, ``empty`` where there is no token."""
    k_rows = tiling.spread(tiling.k_rows, 1, 0)
    q_slots = q_value.new_full((tiling.n_blocks * tiling.block,), empty).index_copy_(0, tiling.q_rows, q_value)
    k_slots = k_value.new_full((tiling.key_rows(),), empty).index_copy_(0, k_rows, k_value)
    return q_slots.view(tiling.n_blocks, tiling.block), spans(k_slots, tiling.n_blocks, tiling.span, tiling.stride)


def _mask(tiling: Tiling, layout: Layout, rule: Rule, dtype: torch.dtype) -> Tensor | None:
    """Hides what is no key, what belongs to another sequence, and what lies in another chunk."""
    owner_q, owner_k = _per_slot(tiling, tiling.q_sequence, tiling.k_sequence, -1)
    hidden = owner_k[:, None, :] != owner_q.amax(1)[:, None, None]
    if rule.chunk is not None and not tiling.chunked:
        i, j = _index(tiling, layout)
        chunk_q, chunk_k = _per_slot(
            tiling, i.div(rule.chunk, rounding_mode="floor"), j.div(rule.chunk, rounding_mode="floor"), 0
        )
        hidden = hidden | (chunk_q[:, :, None] != chunk_k[:, None, :])
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, HIDDEN)


def _index(tiling: Tiling, layout: Layout) -> tuple[Tensor, Tensor]:
    """Index of every query and key among the tokens of its sequence since the start of the stream."""
    q_first = (
        layout.k_cu.diff() - layout.q_cu.diff()
        if layout.k_start is None
        else layout.k_start + layout.k_cu.diff() - layout.q_cu.diff()
    )
    k_first = torch.zeros_like(q_first) if layout.k_start is None else layout.k_start
    i = torch.arange(tiling.q_rows.numel(), device=q_first.device) + (q_first - layout.q_cu[:-1])[tiling.q_sequence]
    j = torch.arange(tiling.k_rows.numel(), device=q_first.device) + (k_first - layout.k_cu[:-1])[tiling.k_sequence]
    return i, j


def _visible_count(tiling: Tiling, layout: Layout, rule: Rule) -> Tensor:
    """``(Q,)`` number of keys that each query sees, counted by arithmetic."""
    i, _ = _index(tiling, layout)
    first = (torch.zeros_like(layout.q_cu[1:]) if layout.k_start is None else layout.k_start)[tiling.q_sequence]
    low, high = first, first + layout.k_cu.diff()[tiling.q_sequence] - 1
    if rule.causal:
        high = torch.minimum(high, i)
    if rule.window is not None:
        low, high = torch.maximum(low, i - rule.window), torch.minimum(high, i + rule.window)
    if rule.chunk is not None:
        chunk = i.div(rule.chunk, rounding_mode="floor") * rule.chunk
        low, high = torch.maximum(low, chunk), torch.minimum(high, chunk + rule.chunk - 1)
    return (high - low + 1).clamp(min=0)
