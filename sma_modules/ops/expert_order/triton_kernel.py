"""Counting sort by expert, and the movement of rows between tokens and experts, as Triton kernels."""

from __future__ import annotations

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def count_kernel(choice, counts, n_entries, share, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """``counts (programs, E)``: how many entries of each program's share go to each expert."""
    program = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    count = tl.zeros((E_PAD,), tl.int32)
    for start in range(program * share, program * share + share, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        # A number out of range goes to the nearest expert: every entry must have a row.
        expert = tl.minimum(tl.maximum(tl.load(choice + entry, mask=entry < n_entries, other=0), 0), E - 1)
        expert = tl.where(entry < n_entries, expert, -1)
        count += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts + program * E + experts, count, mask=experts < E)


@triton.jit
def place_kernel(
    choice,
    counts,
    order,
    inverse,
    total_out,
    ends_out,
    n_entries,
    share,
    programs,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Give every entry its sorted row: behind the smaller experts, the earlier programs and its own predecessors."""
    program = tl.program_id(0)
    experts = tl.arange(0, E_PAD)
    # In chunks, so that (programs, experts) fit into registers whatever their number.
    total = tl.zeros((E_PAD,), tl.int32)
    earlier = tl.zeros((E_PAD,), tl.int32)
    for first in range(0, programs, PROGRAMS):
        row = first + tl.arange(0, PROGRAMS)
        inside = (row[:, None] < programs) & (experts[None, :] < E)
        count = tl.load(counts + row[:, None] * E + experts[None, :], mask=inside, other=0)
        total += tl.sum(count, 0)
        earlier += tl.sum(tl.where(row[:, None] < program, count, 0), 0)
    ends = tl.cumsum(total, 0)
    if program == 0:
        tl.store(total_out + experts, total.to(tl.int64), mask=experts < E)
        tl.store(ends_out + experts, ends, mask=experts < E)
    base = ends - total + earlier
    for start in range(program * share, program * share + share, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        expert = tl.minimum(tl.maximum(tl.load(choice + entry, mask=entry < n_entries, other=0), 0), E - 1)
        expert = tl.where(entry < n_entries, expert, -1)
        mine = expert[:, None] == experts[None, :]
        ones = mine.to(tl.int32)
        row = tl.sum(tl.where(mine, base[None, :] + tl.cumsum(ones, 0) - 1, 0), 1)
        tl.store(inverse + entry, row.to(tl.int64), mask=entry < n_entries)
        tl.store(order + row, entry.to(tl.int64), mask=entry < n_entries)
        base += tl.sum(ones, 0)


@triton.jit
def spread_kernel(x, order, rows, n_rows, D: tl.constexpr, TOP_K: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """``rows[r] = x[order[r] // k]``."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    source = tl.load(order + r, mask=r < n_rows, other=0) // TOP_K
    inside = (r[:, None] < n_rows) & (d[None, :] < D)
    value = tl.load(x + source[:, None] * D + d[None, :], mask=inside)
    tl.store(rows + r.to(tl.int64)[:, None] * D + d[None, :], value, mask=inside)


@triton.jit
def gather_kernel(
    rows,
    inverse,
    weight,
    y,
    n_tokens,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """``y[t] = sum_i w[t, i] rows[inverse[t k + i]]``, added up in float32 in the order of i."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (t[:, None] < n_tokens) & (d[None, :] < D)
    total = tl.zeros((BT, BD), tl.float32)
    for i in tl.static_range(TOP_K):
        row = tl.load(inverse + t * TOP_K + i, mask=t < n_tokens, other=0)
        value = tl.load(rows + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + t * TOP_K + i, mask=t < n_tokens, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(y + t.to(tl.int64)[:, None] * D + d[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def combine_backward_kernel(
    grad,
    rows,
    inverse,
    weight,
    grad_rows,
    grad_weight,
    n_tokens,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """``drows[inverse[t k + i]] = w[t, i] dy[t]`` and ``dw[t, i] = dy[t] . rows[inverse[t k + i]]``, each once."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    known = t < n_tokens
    for i in tl.static_range(TOP_K):
        row = tl.load(inverse + t * TOP_K + i, mask=known, other=0)
        w = tl.load(weight + t * TOP_K + i, mask=known, other=0.0).to(tl.float32)
        dot = tl.zeros((BT, BD), tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = known[:, None] & (d[None, :] < D)
            dy = tl.load(grad + t.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            place = row[:, None] * D + d[None, :]
            dot += dy * tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_rows + place, (w[:, None] * dy).to(grad_rows.dtype.element_ty), mask=inside)
        tl.store(grad_weight + t * TOP_K + i, tl.sum(dot, 1).to(grad_weight.dtype.element_ty), mask=known)
