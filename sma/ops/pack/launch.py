"""Launches of the two kernels of pack as operators: count the tokens of every block, then number them.

A kernel that makes a mask can count on the way, which saves the first launch: ``counts (blocks,)`` holds the True
entries of each :func:`count_block` of the flattened mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.pack.triton_kernel import count_kernel, place_kernel
from sma.ops.pack.types import PackedRows

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
    """See :func:`sma.ops.pack.pack`. Without a capacity it synchronises with the device once."""
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
