"""The definition: one slot, one head and one visible token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.ring_attention.types import Query, Ring
from sma_modules.ops.window_attention.reference import bias_index, one_query, visible


def ring_attention(query: Query, ring: Ring) -> Tensor:
    """Slot after slot; the ring changes in place."""
    (q, k, v, gate, table), active, live, position, at, rule = query
    out = v.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    group = q.shape[1] // k.shape[1]
    for s in range(q.shape[0]):
        if not live[s]:
            continue
        before, after = int(position[s]) % ring.versions, (int(position[s]) + 1) % ring.versions
        own = int(ring.counts[before, s])
        ring.counts[after, s] = own + int(active[s])
        if not active[s]:
            continue
        ring.keys[s, own % ring.rows], ring.values[s, own % ring.rows] = k[s], v[s]
        ring.positions[s, own % ring.rows] = at[s]
        first = max(0, own - ring.reach)
        numbers = [first + j for j in visible(own - first, own - first + 1, first, rule)]
        rows = torch.tensor([number % ring.rows for number in numbers])
        biases = None
        if table is not None:
            last = table.numel()
            biases = torch.stack(
                [
                    table[bias_index(own, number, int(at[s]), int(ring.positions[s, row]), last, rule)]
                    for number, row in zip(numbers, rows.tolist(), strict=True)
                ]
            )
        for head in range(q.shape[1]):
            shared = head // group
            out[s, head] = one_query(q[s, head], ring.keys[s, rows, shared], ring.values[s, rows, shared], biases, rule)
    return out if gate is None else out * gate
