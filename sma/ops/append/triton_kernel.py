"""Kernels of append: one for the bounds of the sequences, and one for the rows of each kind."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bounds_kernel(
    count, arrived, cu_seqlens, start, after, batch, sequences, capacity, FIXED: tl.constexpr, BLOCK: tl.constexpr
):
    """Where sequences begin together, how many rows came before that, and how many there were in all."""
    s = tl.arange(0, BLOCK)
    own, there = s < batch, s < sequences
    had = tl.load(count + s, mask=own, other=0)
    new = tl.load(arrived + s + 1, mask=there, other=0) - tl.load(arrived + s, mask=there, other=0)
    old = tl.minimum(had, capacity)
    tl.store(start + s, had - old, mask=there)
    tl.store(after + s, had + new, mask=own)
    if FIXED:
        unused = tl.sum(tl.where(own, capacity - old, 0))
        old = tl.where(s == batch, unused, old)
    tl.store(cu_seqlens + s + 1, tl.cumsum(old + new), mask=there)
    tl.store(cu_seqlens, 0)


@triton.jit
def rows_kernel(
    was, new, both, after, cu_seqlens, arrived, total, rows, sequences, capacity,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of ``both (total, WIDTH)``, and behind them of ``after (batch * capacity, WIDTH)``, from where they were."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    together, last = r < total, (r >= total) & (r < rows)
    # The last sequence that begins no later: those that do and have no rows come before it.
    low = tl.zeros((BLOCK_R,), tl.int32)
    high = low + sequences
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        later = tl.load(cu_seqlens + middle, mask=together, other=0) > r
        low, high = tl.where(later, low, middle), tl.where(later, middle, high)
    behind = r - total
    sequence = tl.where(together, low, behind // capacity)
    there = together | last
    begin = tl.load(cu_seqlens + sequence, mask=there, other=0)
    length = tl.load(cu_seqlens + sequence + 1, mask=there, other=0) - begin
    first = tl.load(arrived + sequence, mask=there, other=0)
    old = length - (tl.load(arrived + sequence + 1, mask=there, other=0) - first)
    rank = tl.where(together, r - begin, length - capacity + behind % capacity)
    # The sequence of the rows without a token may hold any rows.
    place = tl.minimum(tl.maximum(sequence * capacity + capacity - old + rank, 0), rows - total - 1)
    remembered, cells = (rank >= 0) & (rank < old), d[None, :] < WIDTH
    kept = tl.load(was + place[:, None] * WIDTH + d, mask=(there & remembered)[:, None] & cells, other=0)
    fresh = (first + rank - old)[:, None] * WIDTH + d
    value = tl.load(new + fresh, mask=(there & (rank >= old))[:, None] & cells, other=0)
    value = tl.where(remembered[:, None], kept.to(value.dtype), value)
    tl.store(both + r[:, None] * WIDTH + d, value, mask=together[:, None] & cells)
    tl.store(after + behind[:, None] * WIDTH + d, value, mask=last[:, None] & cells)
