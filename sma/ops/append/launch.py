"""Launches of the kernels of append as operators: the bounds of the sequences, and the rows of each kind."""

from __future__ import annotations

from math import prod

from torch import Tensor

from sma.ops.append.triton_kernel import bounds_kernel, rows_kernel
from sma.ops.append.types import AppendedRows
from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.packed import Packed

ELEMENTS, COLUMNS = 2048, 256
"""Numbers that a program moves, and those of one row at most."""
WARPS = 4


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
