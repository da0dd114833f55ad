"""append as gathers: where every row comes from follows from the counts alone."""

import torch
from torch import Tensor

from sma.ops.append.types import AppendedRows
from sma.ops.packed import Packed


def append(remembered: tuple[Tensor, ...], count: Tensor, rows: tuple[Tensor, ...], packed: Packed) -> AppendedRows:
    """One ``index_select`` for what is returned together, and one for what is remembered, of each kind."""
    batch, capacity = remembered[0].shape[:2]
    old = count.clamp(max=capacity)
    start = count - old
    if packed.fixed:
        unused = batch * capacity - old.sum(0, keepdim=True)
        old, start = torch.cat([old, unused]), torch.cat([start, torch.zeros_like(unused)])
    lengths = old + packed.lengths
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total = batch * capacity + packed.index.shape[0] if packed.fixed else int(cu_seqlens[-1])
    sequence = torch.repeat_interleave(lengths, output_size=total)
    rank = torch.arange(total, device=cu_seqlens.device) - cu_seqlens[sequence]
    before = sequence * capacity + capacity - old[sequence] + rank
    if packed.fixed:  # the sequence of the rows without a token may hold any rows
        before = before.clamp(0, max(batch * capacity - 1, 0))
    arrived = batch * capacity + packed.cu_seqlens[sequence] + rank - old[sequence]
    source = torch.where(rank < old[sequence], before, arrived)
    both = tuple(
        torch.cat([was.flatten(0, 1).to(row.dtype), row]).index_select(0, source)
        for was, row in zip(remembered, rows, strict=True)
    )
    after = _last(both, cu_seqlens[: batch + 1], capacity)
    return AppendedRows(both, after, cu_seqlens, start, count + packed.lengths[:batch])


def _last(rows: tuple[Tensor, ...], cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, ...]:
    """The last ``capacity`` rows of every sequence ``(B, capacity, ...)``, zeros in front of shorter ones."""
    index = cu_seqlens[1:, None] - capacity + torch.arange(capacity, device=cu_seqlens.device)
    unused = index < cu_seqlens[:-1, None]
    if not rows[0].shape[0]:
        return tuple(row.new_zeros(*index.shape, *row.shape[1:]) for row in rows)
    flat = index.clamp(min=0).flatten()
    return tuple(
        row.index_select(0, flat)
        .view(*index.shape, *row.shape[1:])
        .masked_fill(unused.view(*index.shape, *(1,) * (row.dim() - 1)), 0)
        for row in rows
    )
