"""Window attention with batched matrix products over blocks of queries and overlapping spans of keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.dropout import dropout
from sma.ops.backend import concrete
from sma_modules.ops.window_attention.masks import biases, visible_count
from sma_modules.ops.window_attention.products import pick, place, scores, values
from sma_modules.ops.window_attention.tiling import Tiling, tile
from sma_modules.ops.window_attention.types import LAPLACE_DEVIATION, LAPLACE_MEAN, Inputs, Layout, Rule


def window_attention(inputs: Inputs, layout: Layout, rule: Rule) -> Tensor:
    """The default backend; never holds a tensor of length times length when there is a window or a chunk."""
    q, k, v, gate, table = inputs
    if k.shape[1] != q.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if not q.shape[0] or not k.shape[0] or not q.shape[1]:
        out = _without_keys(q, k, v, table)
    elif layout.aligned and rule.window is rule.chunk is None and (rule.activation, rule.bias) == ("softmax", "none"):
        out = _padded(q, k, v, layout, rule)
    else:
        out = _tiled(q, k, v, table, layout, rule)
    return out if gate is None else out * gate


def _tiled(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, layout: Layout, rule: Rule) -> Tensor:
    # Reading all values is cheap on a CPU. Elsewhere it would synchronise with the device: take the safe tiling.
    finite = concrete(k) and bool((k.detach().sum() + v.detach().sum()).isfinite())
    tiling = tile(q.shape[0], k.shape[0], layout, rule, finite)
    softmax, divisor, count = rule.activation == "softmax", None, None
    if not softmax:
        divisor = rule.divisor
    if not layout.aligned or not (softmax or divisor):
        count = visible_count(tiling, layout, rule)
        if not softmax and divisor is None:
            q = q / count.clamp(min=1)[:, None, None].to(q.dtype)
    scale = q.shape[-1] ** -0.5 if softmax else 1.0 / (divisor or 1)
    out = _attend(q, k, v, scale, tiling, *biases(tiling, layout, rule, table, q), rule)
    return out if layout.aligned or count is None else torch.where(count[:, None, None] > 0, out, 0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tiling: Tiling, bias: Tensor, mask: Tensor | None, rule: Rule
) -> Tensor:
    """Place rows in blocks and spans, attend, pick the rows of the queries. Queries without keys get a finite value.

    Args:
        q: ``(Q, H, z)``.
        k: ``(K, H, z)``.
        v: ``(K, H, h)``.
        scale: factor of the products.
        tiling: blocks and spans.
        bias: ``(block, span)`` or ``(n_blocks, block, span)``, hidden pairs included.
        mask: ``(n_blocks, 1 or block, span)``, added as well, in place.
        rule: activation and dropout.
    """
    heads, width = q.shape[1:]
    n, block = heads * tiling.n_blocks, tiling.block
    if q.dtype != torch.float64:  # scores in less than float32 would lose more accuracy than all other steps
        q, k = q.float(), k.float()
    q_rows, k_rows = tiling.q_rows, tiling.k_rows
    if heads > 1 or tiling.spare:
        q_rows = tiling.of_heads(q_rows, heads, tiling.n_blocks * block)
        k_rows = tiling.of_heads(k_rows, heads, tiling.n_blocks * tiling.stride)
    n_rows = tiling.key_rows(heads)
    blocks = place(q.reshape(-1, width), q_rows, n * block).view(n, block, width)
    keys = place(k.reshape(-1, width), k_rows, n_rows)
    spread = place(v.reshape(-1, v.shape[2]), k_rows, n_rows)
    if heads > 1:
        bias = bias.repeat(heads, 1, 1) if bias.dim() == 3 else bias
        mask = None if mask is None else mask.repeat(heads, 1, 1)
    weights = scores(bias, blocks, keys, scale, tiling.span, tiling.stride)
    if mask is not None:
        # In place: adding a constant needs neither operand for its gradient, and scores are the largest tensor here.
        weights = weights.add_(mask)
    weights = _activate(weights, rule)
    weights = dropout(weights, rule.dropout) if rule.dropout else weights
    out = values(weights.to(v.dtype), spread, tiling.stride)
    return pick(out.view(n * block, -1), q_rows).view(*q.shape[:2], -1)


def _padded(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> Tensor:
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
    if not rule.causal:  # a causal query sees no padding, which comes after it
        empty = torch.arange(tiling.block, device=q.device) >= layout.k_cu.diff()[:, None]
        mask = torch.zeros_like(empty, dtype=q.dtype).masked_fill_(empty, torch.finfo(q.dtype).min / 2)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rule.dropout, is_causal=rule.causal)
    out = out.transpose(1, 2).reshape(tiling.n_blocks * tiling.block, -1)
    return pick(out, tiling.q_rows).view(n_queries, heads, -1)


def _without_keys(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
    """Zeros in the autograd graph of every input."""
    graph = (q[:0].sum() + k[:0].sum() + (0 if table is None else table[:0].sum())).to(v.dtype) + v[:0].sum()
    return v.new_zeros(q.shape[0], *v.shape[1:]) + graph


def _activate(scores: Tensor, rule: Rule) -> Tensor:
    if rule.activation == "softmax":
        return torch.softmax(scores, -1)
    if rule.activation == "relu2":
        return torch.relu(scores).square()
    return 0.5 * (1 + torch.erf((scores - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2))))
