"""append in one kernel for the bounds of the sequences, and one for the rows of each kind."""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from sma.ops.append import AppendedRows
from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.packed import Packed

ELEMENTS, COLUMNS = 2048, 256
"""Numbers that a program moves, and those of one row at most."""
WARPS = 4


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
    # Any rows that are there are good enough for the sequence of nothing.
    place = tl.minimum(tl.maximum(sequence * capacity + capacity - old + rank, 0), rows - total - 1)
    remembered, cells = (rank >= 0) & (rank < old), d[None, :] < WIDTH
    kept = tl.load(was + place[:, None] * WIDTH + d, mask=(there & remembered)[:, None] & cells, other=0)
    fresh = (first + rank - old)[:, None] * WIDTH + d
    value = tl.load(new + fresh, mask=(there & (rank >= old))[:, None] & cells, other=0)
    value = tl.where(remembered[:, None], kept.to(value.dtype), value)
    tl.store(both + r[:, None] * WIDTH + d, value, mask=together[:, None] & cells)
    tl.store(after + behind[:, None] * WIDTH + d, value, mask=last[:, None] & cells)


def warps_for(sequences: int) -> int:
    """Of the one program for the bounds of so many sequences."""
    return max(1, min(sequences // 64, 16))


def _bounds_fake(count: Tensor, arrived: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return arrived.new_empty(arrived.shape[0]), arrived.new_empty(arrived.shape[0] - 1), count.new_empty(count.shape)


@kernel("append_bounds", fake=_bounds_fake)
def bounds(count: Tensor, arrived: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """``cu_seqlens``, ``start`` and ``counts`` of :class:`AppendedRows`; ``arrived`` are the bounds of the new rows."""
    outs = _bounds_fake(count, arrived, capacity)
    batch, sequences = count.shape[0], arrived.shape[0] - 1
    block = next_power_of_2(max(sequences, 1))
    bounds_kernel[(1,)](
        count, arrived, *outs, batch, sequences, capacity,
        FIXED=sequences > batch, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return outs


def _rows_fake(was: Tensor, new: Tensor, cu_seqlens: Tensor, arrived: Tensor, total: int) -> tuple[Tensor, Tensor]:
    return new.new_empty(total, *new.shape[1:]), new.new_empty(was.shape)


@kernel("append_rows", fake=_rows_fake)
def rows(was: Tensor, new: Tensor, cu_seqlens: Tensor, arrived: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """One kind of ``both`` and ``after`` of :class:`AppendedRows`; everything is contiguous."""
    both, after = _rows_fake(was, new, cu_seqlens, arrived, total)
    (batch, capacity), width, sequences = was.shape[:2], prod(new.shape[1:]), cu_seqlens.shape[0] - 1
    count = total + batch * capacity
    if count and width:
        block_d = min(next_power_of_2(width), COLUMNS)
        block_r = max(1, min(ELEMENTS // block_d, 128))
        rows_kernel[(cdiv(count, block_r), cdiv(width, block_d))](
            was, new, both, after, cu_seqlens, arrived, total, count, sequences, max(capacity, 1),
            WIDTH=width, STEPS=sequences.bit_length(), BLOCK_R=block_r, BLOCK_D=block_d, num_warps=WARPS,
        )  # fmt: skip
    return both, after


def append(remembered: tuple[Tensor, ...], count: Tensor, new: tuple[Tensor, ...], packed: Packed) -> AppendedRows:
    """See :func:`sma.ops.append.append`."""
    arrived, (batch, capacity) = packed.cu_seqlens.contiguous(), remembered[0].shape[:2]
    cu_seqlens, start, counts = bounds(count.contiguous(), arrived, capacity)
    total = batch * capacity + packed.index.shape[0] if packed.fixed else int(cu_seqlens[-1])
    pairs = [
        rows(was.contiguous(), row.contiguous(), cu_seqlens, arrived, total)
        for was, row in zip(remembered, new, strict=True)
    ]
    both, after = zip(*pairs, strict=True)
    return AppendedRows(both, after, cu_seqlens, start, counts)
