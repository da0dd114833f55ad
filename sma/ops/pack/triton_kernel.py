"""pack in two kernels: count the tokens of every block, then number them.

Whoever makes a mask in a kernel can count on the way, and leave one of them out: ``counts (blocks,)`` holds the True
entries of each :func:`count_block` of the flattened mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.pack import PackedRows

BLOCK = 1024
"""Tokens of a program."""
SMALL, SMALL_BLOCK = 1 << 15, 256
"""Of so many tokens at most, fewer: all programs run at once then, and have few counts to add up."""
WARPS = 4
LEAST_COUNTED, MOST_BLOCKS = 32, 8192


def count_block(total: int) -> int:
    """How many entries make a block of ``counts``: few where there are few, so that many programs can count, but never
    so few that adding up the counts, which every program does that numbers, would take long.
    """
    each: int = next_power_of_2(cdiv(total, MOST_BLOCKS))
    return max(LEAST_COUNTED, min(each, BLOCK))


@triton.jit
def count_kernel(mask, counts, total, blocks, step, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """True entries of each ``EACH`` of the flattened mask."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    token = first + tl.arange(0, BLOCK)
    active = tl.load(mask + token * step, mask=token < total, other=0).to(tl.int32)
    each = tl.sum(tl.reshape(active, (BLOCK // EACH, EACH)), 1)
    at = first // EACH + tl.arange(0, BLOCK // EACH)
    tl.store(counts + at, each, mask=at < blocks)


@triton.jit
def place_kernel(
    mask,
    counts,
    position,
    index,
    where,
    row,
    kept,
    cu_seqlens,
    overflow,
    total,
    length,
    batch,
    blocks,
    rows,
    step,
    stride,
    HAS_POSITION: tl.constexpr,
    SPARE: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of the tokens of one block, and the bounds of the sequences that begin in it.

    ``SPARE``: there may be more rows than tokens, or fewer; each program fills its share of those without a token.
    """
    block = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.load(counts + at, mask=at < blocks, other=0)
        before += tl.where(at < block * (BLOCK // EACH), count, 0)
        found += count
    first = block.to(tl.int64) * BLOCK
    token = first + tl.arange(0, BLOCK)
    # One division of 64 bits, the others of 32, which are several times as fast.
    along = (first % length).to(tl.int32) + tl.arange(0, BLOCK)
    sequence, column = first // length + along // length, along % length
    inside = token < total
    active = tl.load(mask + token * step, mask=inside, other=0).to(tl.int32)
    rank = tl.sum(before) + tl.cumsum(active) - active
    placed = (active > 0) & (rank < rows)
    tl.store(row + token, tl.where(placed, rank, -1), mask=inside)
    tl.store(index + rank, token, mask=placed)
    t = tl.load(position + sequence * stride + column, mask=placed, other=0) if HAS_POSITION else column
    tl.store(where + rank, t.to(tl.int64), mask=placed)
    bound = tl.minimum(rank, rows).to(tl.int64)
    tl.store(cu_seqlens + sequence, bound, mask=inside & (column == 0))
    end = tl.minimum(rank + active, rows).to(tl.int64)
    tl.store(cu_seqlens + batch + token * 0, end, mask=token == total - 1)
    if SPARE:
        tl.store(kept + token, placed, mask=inside)
        all_found = tl.sum(found)
        for start in range(block * BLOCK, rows, tl.num_programs(0) * BLOCK):
            r = start + tl.arange(0, BLOCK)
            spare = (r >= all_found) & (r < rows)
            tl.store(index + r, token * 0 + total, mask=spare)
            tl.store(where + r, token * 0, mask=spare)
        if block == 0:
            tl.store(cu_seqlens + batch + 1, rows)
            tl.store(overflow, tl.maximum(all_found - rows, 0))


def _count_fake(mask: Tensor) -> Tensor:
    total = mask.numel()
    return mask.new_empty(cdiv(total, count_block(total)), dtype=torch.int32)


@kernel("pack_count", fake=_count_fake)
def count(mask: Tensor) -> Tensor:
    """``(blocks,)`` int32: True entries of each block of a mask ``(B, L)``, see :func:`count_block`."""
    counts = _count_fake(mask)
    total = mask.numel()
    count_kernel[(cdiv(total, BLOCK),)](
        mask, counts, total, counts.numel(), mask.stride(1), EACH=count_block(total), BLOCK=BLOCK, num_warps=WARPS
    )
    return counts


def _place_fake(
    mask: Tensor, counts: Tensor, position: Tensor | None, rows: int, spare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=mask.device)

    batch = mask.shape[0]
    row = torch.empty(mask.numel(), dtype=torch.int32, device=mask.device)
    kept = torch.empty(mask.shape if spare else (0, 0), dtype=torch.bool, device=mask.device)
    return integers(rows), integers(batch + 1 + spare), row, integers(rows), kept, integers(*(() if spare else (0,)))


@kernel("pack_place", fake=_place_fake)
def place(
    mask: Tensor, counts: Tensor, position: Tensor | None, rows: int, spare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``tokens``, ``cu_seqlens``, ``row``, ``position``, ``kept`` and ``overflow`` of :class:`PackedRows`.

    The last two are empty unless ``spare``: the number of rows is a capacity. Rows of the mask follow each other at a
    constant step.
    """
    index, cu_seqlens, row, where, kept, overflow = outs = _place_fake(mask, counts, position, rows, spare)
    total = mask.numel()
    block = SMALL_BLOCK if total <= SMALL else BLOCK
    place_kernel[(cdiv(total, block),)](
        mask,
        counts,
        mask if position is None else position,
        index,
        where,
        row,
        kept,
        cu_seqlens,
        overflow,
        total,
        mask.shape[1],
        mask.shape[0],
        counts.numel(),
        rows,
        mask.stride(1),
        0 if position is None else position.stride(0),
        HAS_POSITION=position is not None,
        SPARE=spare,
        EACH=count_block(total),
        BLOCK=block,
        num_warps=WARPS,
    )
    return outs


def pack(mask: Tensor, position: Tensor | None, capacity: int | None, counts: Tensor | None) -> PackedRows:
    """See :func:`sma.ops.pack.pack`. Without a capacity it waits once for the number of rows."""
    if mask.shape[0] > 1 and mask.stride(0) != mask.shape[1] * mask.stride(1):
        mask = mask.contiguous()
    if counts is None:
        counts = count(mask)
    rows = int(counts.sum()) if capacity is None else capacity
    if position is not None and position.stride(1) != 1:  # rows may be the same one over and over
        position = position.contiguous()
    index, cu_seqlens, row, where, kept, overflow = place(mask, counts, position, rows, capacity is not None)
    if capacity is None:
        return PackedRows(index, cu_seqlens, row, where, mask, None)
    return PackedRows(index, cu_seqlens, row, where, kept, overflow)
