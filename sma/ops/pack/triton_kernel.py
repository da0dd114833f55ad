"""pack in two kernels: count the tokens of every block, then number them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sma.ops.kernel import kernel
from sma.ops.pack import PackedRows

BLOCK = 1024
WARPS = 4


@triton.jit
def count_kernel(mask, counts, total, BLOCK: tl.constexpr):
    """True entries of each block of the flattened mask."""
    block = tl.program_id(0)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(mask + token, mask=token < total, other=0).to(tl.int32)
    tl.store(counts + block, tl.sum(active))


@triton.jit
def place_kernel(
    mask,
    ends,
    position,
    index,
    where,
    row,
    cu_seqlens,
    total,
    length,
    batch,
    rows,
    stride,
    HAS_POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of the tokens of one block, and the bounds of the sequences that begin in it."""
    block = tl.program_id(0)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < total
    active = tl.load(mask + token, mask=inside, other=0).to(tl.int32)
    first = tl.load(ends + block) - tl.sum(active)
    rank = first + tl.cumsum(active) - active
    kept = (active > 0) & (rank < rows)
    tl.store(row + token, tl.where(kept, rank, -1), mask=inside)
    tl.store(index + rank, token, mask=kept)
    column = token % length
    t = tl.load(position + (token // length) * stride + column, mask=kept, other=0) if HAS_POSITION else column
    tl.store(where + rank, t.to(tl.int64), mask=kept)
    bound = tl.minimum(rank, rows).to(tl.int64)
    tl.store(cu_seqlens + token // length, bound, mask=inside & (column == 0))
    end = tl.minimum(rank + active, rows).to(tl.int64)
    tl.store(cu_seqlens + batch + token * 0, end, mask=token == total - 1)


def _count_fake(mask: Tensor) -> Tensor:
    return mask.new_empty(triton.cdiv(mask.numel(), BLOCK), dtype=torch.int32)


@kernel("pack_count", fake=_count_fake)
def count(mask: Tensor) -> Tensor:
    """``(ceil(B L / BLOCK),)`` int32: True entries of each block of a contiguous mask."""
    counts = _count_fake(mask)
    count_kernel[(counts.numel(),)](mask, counts, mask.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return counts


def _place_fake(
    mask: Tensor, ends: Tensor, position: Tensor | None, rows: int, spare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def integers(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, device=mask.device)

    row = torch.empty(mask.numel(), dtype=torch.int32, device=mask.device)
    return integers(rows), integers(mask.shape[0] + 1), row, integers(rows)


@kernel("pack_place", fake=_place_fake)
def place(
    mask: Tensor, ends: Tensor, position: Tensor | None, rows: int, spare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tokens``, ``cu_seqlens``, ``row`` and ``position`` of :class:`PackedRows`; ``ends`` is the running count."""
    index, cu_seqlens, row, where = _place_fake(mask, ends, position, rows, spare)
    if spare:
        index.fill_(mask.numel())
        where.zero_()
    place_kernel[(ends.numel(),)](
        mask,
        ends,
        mask if position is None else position,
        index,
        where,
        row,
        cu_seqlens,
        mask.numel(),
        mask.shape[1],
        mask.shape[0],
        rows,
        0 if position is None else position.stride(0),
        HAS_POSITION=position is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return index, cu_seqlens, row, where


def pack(mask: Tensor, position: Tensor | None, capacity: int | None) -> PackedRows:
    """See :func:`sma.ops.pack.pack`. Without a capacity it waits once for the number of rows."""
    mask = mask.contiguous()
    ends = count(mask).cumsum(0, dtype=torch.int32)
    rows = int(ends[-1]) if capacity is None else capacity
    if position is not None and position.stride(1) != 1:  # rows may be the same one over and over
        position = position.contiguous()
    index, cu_seqlens, row, where = place(mask, ends, position, rows, capacity is not None)
    overflow = None if capacity is None else (ends[-1].long() - capacity).clamp(min=0)
    return PackedRows(index, cu_seqlens, row, where, overflow)
