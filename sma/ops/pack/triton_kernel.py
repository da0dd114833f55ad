"""Kernels of pack: one counts the tokens of every block, the other numbers them."""

from __future__ import annotations

import triton
import triton.language as tl


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
