"""The kernels as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.kernel import kernel
from sma_modules.ops.ring_attention import triton_kernel as kernels
from sma_modules.ops.ring_attention.types import Query, Ring

SPAN, FEATURES, WARPS = 64, 256, 8
"""Tokens and features of the values of a program: a tile of values that its threads hold."""
SUM_FEATURES, SUM_WARPS = 64, 4
_ACTIVATION = {"softmax": 0, "relu2": 1, "laplace": 2}
_BIAS = {"none": 0, "original": 1, "local": 2}


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


def spans_of(reach: int) -> int:
    """How many programs share the tokens that one may see."""
    return -(-(reach + 1) // SPAN)


def tile(features: int) -> int:
    """Features of a value that one program takes."""
    return min(FEATURES, _power_of_two(features))


@kernel("ring_attention", fake=_fake, mutates=("keys", "values", "positions", "counts"))
def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    table: Tensor | None,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    counts: Tensor,
    active: Tensor,
    live: Tensor,
    position: Tensor,
    at: Tensor,
    reach: int,
    window: int,
    chunk: int,
    activation: int,
    bias: int,
) -> Tensor:
    """The output ``(S, H, h)``; the ring changes in place."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    gate = None if gate is None else gate.contiguous()
    (slots, heads, z), (groups, f) = q.shape, v.shape[1:]
    out = v.new_empty(slots, heads, f)
    spans = spans_of(reach)
    several = spans > 1
    best, total = (q.new_empty(slots * heads * spans if several else 0, dtype=torch.float32) for _ in range(2))
    partial = q.new_empty(slots * heads * spans * f if several else 0, dtype=torch.float32)
    scale = z**-0.5 if activation == 0 else 1.0 / max(window, 1)
    rule = {"WINDOW": window, "CHUNK": chunk, "ACTIVATION": activation, "SPANS": spans, "BT": SPAN}
    sizes = {"H": heads, "F": f, "VERSIONS": counts.shape[0]}
    kernels.span_kernel[(slots * heads, spans, -(-f // tile(f)))](
        q, k, v, gate, table, keys, values, positions, counts, active, live, position, at, best, total, partial, out,
        slots, scale,
        G=groups, Z=z, ROWS=keys.shape[1], BIAS=bias, LAST=0 if table is None else (table.numel() - 1) // 2,
        BZ=_power_of_two(z), BF=tile(f), **sizes, **rule, num_warps=WARPS,
    )  # fmt: skip
    if several:
        features = min(SUM_FEATURES, _power_of_two(f))
        kernels.sum_kernel[(slots * heads, -(-f // features))](
            counts, gate, active, position, best, total, partial, out, slots,
            BS=_power_of_two(spans), BF=features, **sizes, **rule, num_warps=SUM_WARPS,
        )  # fmt: skip
    return out


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ring_attention(query: Query, ring: Ring) -> Tensor:
    """See :func:`sma_modules.ops.ring_attention.ring_attention`."""
    (q, k, v, gate, table), rule = query.inputs, query.rule
    out: Tensor = run(
        q,
        k.to(ring.keys.dtype),
        v.to(ring.values.dtype),
        gate,
        table,
        ring.keys,
        ring.values,
        ring.positions,
        ring.counts,
        query.active,
        query.live,
        query.position,
        query.at,
        rule.reach or 0,
        rule.window or 0,
        rule.chunk or 0,
        _ACTIVATION[rule.activation],
        _BIAS[rule.bias],
    )
    return out
