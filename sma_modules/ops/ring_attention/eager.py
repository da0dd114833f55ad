"""Ring attention with PyTorch's own functions, over all rows of the ring, in fixed shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sma.ops.backend import concrete
from sma.steppers import choose
from sma_modules.ops.ring_attention.types import Query, Ring
from sma_modules.ops.window_attention.types import LAPLACE_DEVIATION, LAPLACE_MEAN, Rule


def ring_attention(query: Query, ring: Ring) -> Tensor:
    """On a CPU slots that are not active are left out; elsewhere finding them would synchronise with the device."""
    own = ring.count(query.position)
    _advance(query, ring, own)
    q, _, v, gate, table = query.inputs
    memory = ring.keys, ring.values, ring.positions
    out = v.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    if concrete(query.active) and not bool(query.active.all()):
        rows = query.active.nonzero().squeeze(1)
        if rows.numel():
            some = tuple(each.index_select(0, rows) for each in memory)
            attended = _attention(q[rows], some, own[rows], query.at[rows], table, query.rule)
            out = out.index_copy(0, rows, attended.to(v.dtype))
    else:
        attended = _attention(q, memory, own, query.at, table, query.rule).to(v.dtype)
        out = attended.masked_fill(~query.active[:, None, None], 0)
    return out if gate is None else out * gate


def _advance(query: Query, ring: Ring, own: Tensor) -> None:
    """Put the new tokens in, and count them."""
    slot = torch.arange(own.numel(), device=own.device)
    place = slot * ring.rows + own % ring.rows
    for memory, row in ((ring.keys, query.inputs.k), (ring.values, query.inputs.v), (ring.positions, query.at)):
        flat = memory.view(-1, *memory.shape[2:])
        flat.index_copy_(0, place, choose(query.active, row.to(flat.dtype), flat.index_select(0, place)))
    ring.advance(query.live, query.position, own + query.active)


def _attention(
    q: Tensor, memory: tuple[Tensor, ...], own: Tensor, at: Tensor, table: Tensor | None, rule: Rule
) -> Tensor:
    """``(n, H, h)`` in float32 at least for queries ``(n, H, z)``, tokens number ``own (n,)`` of their sequences."""
    keys, values, positions = memory
    n, heads, width = q.shape
    groups = keys.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    row = torch.arange(keys.shape[1], device=q.device)
    distance = (own[:, None] - row) % keys.shape[1]  # how many tokens back the one in each row of the ring was
    seen = distance <= own[:, None]
    if rule.window is not None:
        seen = seen & (distance <= rule.window)
    if rule.chunk is not None:
        seen = seen & (distance <= (own % rule.chunk)[:, None])
    grouped = q.view(n, groups, heads // groups, width).to(wide)
    products = grouped @ keys.permute(0, 2, 3, 1).to(wide)
    if rule.activation == "softmax":
        scores = products * width**-0.5
    else:
        count = seen.sum(1)[:, None, None, None] if rule.divisor is None else rule.divisor
        scores = products / count
    if table is not None:
        scores = scores + _bias(table, distance, positions, at, rule).to(wide)[:, None, None]
    weights = _weights(scores, seen[:, None, None], rule)
    # Rows that are not seen have weight zero; they are of this sequence or zero, and so finite.
    return (weights @ values.permute(0, 2, 1, 3).to(wide)).view(n, heads, values.shape[3])


def _bias(table: Tensor, distance: Tensor, positions: Tensor, at: Tensor, rule: Rule) -> Tensor:
    """``(n, R)``."""
    if rule.bias == "original":
        last = (table.numel() - 1) // 2
        return table[last + (positions - at[:, None]).clamp(-last, last)]
    assert rule.window is not None
    return table[(4 * rule.window - 1 - distance).clamp(min=0)]


def _weights(scores: Tensor, seen: Tensor, rule: Rule) -> Tensor:
    if rule.activation == "softmax":
        return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    if rule.activation == "relu2":
        weights = torch.relu(scores) ** 2
    else:
        weights = 0.5 * (1 + torch.erf((scores - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2))))
    return weights.masked_fill(~seen, 0)
