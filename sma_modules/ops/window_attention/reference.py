"""The definition of window attention: plain loops over sequences, queries, heads and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sma_modules.ops.window_attention.types import LAPLACE_DEVIATION, LAPLACE_MEAN, Inputs, Layout, Rule


def visible(i: int, n_keys: int, start: int, rule: Rule) -> list[int]:
    """The keys, counted from the first one present, that the query aligned with key ``i`` sees."""
    keys = []
    for j in range(n_keys):
        seen = j <= i if rule.causal else True
        if rule.window is not None:
            seen = seen and abs(i - j) <= rule.window
        if rule.chunk is not None:
            seen = seen and (start + i) // rule.chunk == (start + j) // rule.chunk
        if seen:
            keys.append(j)
    return keys


def bias_index(i: int, j: int, t_i: int, t_j: int, entries: int, rule: Rule) -> int:
    """Where in the table the bias between query i and key j stands; ``t`` are original positions."""
    if rule.bias == "original":
        last = (entries - 1) // 2
        return last + max(-last, min(last, t_j - t_i))
    assert rule.window is not None
    return 4 * rule.window - 1 + (j - i)


def weights_of(scores: Tensor, rule: Rule) -> Tensor:
    """Attention weights of one query from its scores ``(n,)``, in float32 at least."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if rule.activation == "softmax":
        return torch.softmax(scores, 0)
    if rule.activation == "relu2":
        return torch.relu(scores) ** 2
    return 0.5 * (1 + torch.erf((scores - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2))))


def one_query(q: Tensor, keys: Tensor, values: Tensor, biases: Tensor | None, rule: Rule) -> Tensor:
    """Output ``(h,)`` of one query ``(z,)`` from its n > 0 visible keys ``(n, z)`` and values ``(n, h)``."""
    products = torch.stack([(q * key).sum() for key in keys])
    if rule.activation == "softmax":
        scores = products * q.shape[-1] ** -0.5
    else:
        scores = products / (len(keys) if rule.divisor is None else rule.divisor)
    if biases is not None:
        scores = scores + biases
    weights = torch.dropout(weights_of(scores, rule), rule.dropout, rule.dropout > 0).to(values.dtype)
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(0)


def window_attention(inputs: Inputs, layout: Layout, rule: Rule) -> Tensor:
    """One query and one head at a time; memory and time in proportion to queries times keys."""
    q, k, v, gate, table = inputs
    group = q.shape[1] // max(k.shape[1], 1)
    rows: list[Tensor] = []
    for b in range(layout.q_cu.numel() - 1):
        q_first, q_end = int(layout.q_cu[b]), int(layout.q_cu[b + 1])
        k_first, k_end = int(layout.k_cu[b]), int(layout.k_cu[b + 1])
        start = 0 if layout.k_start is None else int(layout.k_start[b])
        for row in range(q_first, q_end):
            i = row - q_end + k_end - k_first
            seen = visible(i, k_end - k_first, start, rule)
            keys = [k_first + j for j in seen]
            biases = None
            if table is not None and rule.bias == "original":
                assert layout.q_position is not None
                assert layout.k_position is not None
                t = [(int(layout.q_position[row]), int(layout.k_position[key])) for key in keys]
                biases = table[[bias_index(0, 0, t_i, t_j, table.numel(), rule) for t_i, t_j in t]]
            elif table is not None and rule.bias == "local":
                biases = table[[bias_index(i, j, 0, 0, table.numel(), rule) for j in seen]]
            heads = [
                one_query(q[row, n], k[keys, n // group], v[keys, n // group], biases, rule)
                for n in range(q.shape[1])
                if keys
            ]
            rows.append(torch.stack(heads) if heads else v.new_zeros(q.shape[1], v.shape[2]))
    # The sum over no rows of every input keeps the autograd graph where no query sees any key.
    graph = (q[:0].sum() + k[:0].sum() + (table[:0].sum() if table is not None else 0)).to(v.dtype) + v[:0].sum()
    out = torch.stack([*rows, v.new_zeros(q.shape[1], v.shape[2])])[:-1] + graph
    return out if gate is None else out * gate
