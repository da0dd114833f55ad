"""What is added to the products of queries and keys: biases, and the masks that hide keys."""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.window_attention.products import lookup
from sma_modules.ops.window_attention.tiling import Tiling, spans
from sma_modules.ops.window_attention.types import Layout, Rule

HIDDEN = -1e30
"""Added to scores that must not count: below every score, and twice of it is still finite in float32."""


def biases(tiling: Tiling, layout: Layout, rule: Rule, table: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor | None]:
    """A differentiable bias ``(block, span)`` or ``(n_blocks, block, span)`` of the products, window included,
    and a mask ``(n_blocks, 1 or block, span)`` or None.
    """
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
    t_q, t_k = _per_row(tiling, layout.q_position, layout.k_position + last, 0)
    return (t_k[:, None, :] - t_q[:, :, None]).clamp_(0, 2 * last)


def _per_row(tiling: Tiling, q_value: Tensor, k_value: Tensor, empty: int) -> tuple[Tensor, Tensor]:
    """Numbers of queries ``(n_blocks, block)`` and keys ``(n_blocks, span)``, ``empty`` where there is no token."""
    k_rows = tiling.of_heads(tiling.k_rows, 1, 0) if tiling.spare else tiling.k_rows
    of_q = q_value.new_full((tiling.n_blocks * tiling.block,), empty).index_copy_(0, tiling.q_rows, q_value)
    of_k = k_value.new_full((tiling.key_rows(1),), empty).index_copy_(0, k_rows, k_value)
    return of_q.view(tiling.n_blocks, tiling.block), spans(of_k, tiling.n_blocks, tiling.span, tiling.stride)


def _mask(tiling: Tiling, layout: Layout, rule: Rule, dtype: torch.dtype) -> Tensor | None:
    """Hides what is no key, what belongs to another sequence, and what lies in another chunk."""
    owner_q, owner_k = _per_row(tiling, tiling.q_sequence, tiling.k_sequence, -1)
    hidden = owner_k[:, None, :] != owner_q.amax(1)[:, None, None]
    if rule.chunk is not None and not tiling.chunked:
        i, j = _index(tiling, layout)
        chunk_q, chunk_k = _per_row(
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


def visible_count(tiling: Tiling, layout: Layout, rule: Rule) -> Tensor:
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
