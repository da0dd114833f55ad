"""The definition of append, sequence by sequence."""

import torch
from torch import Tensor

from sma.ops.append.types import AppendedRows
from sma.ops.packed import Packed


def append(remembered: tuple[Tensor, ...], count: Tensor, rows: tuple[Tensor, ...], packed: Packed) -> AppendedRows:
    """Cut out what each sequence remembers and what is new of it, and lay them one behind the other."""
    capacity, bounds = remembered[0].shape[1], packed.cu_seqlens.tolist()
    held = [min(each, capacity) for each in count.tolist()]
    unused = packed.batch * capacity - sum(held)
    both, after = [], []
    for was, row in zip(remembered, rows, strict=True):
        one_by_one, last = [row[:0]], [was.new_zeros(0, *was.shape[1:]).to(row.dtype)]
        for b in range(packed.batch):
            own = torch.cat([was[b, capacity - held[b] :].to(row.dtype), row[bounds[b] : bounds[b + 1]]])
            one_by_one.append(own)
            front = own.new_zeros(max(capacity - len(own), 0), *own.shape[1:])
            last.append(torch.cat([front, own[max(len(own) - capacity, 0) :]])[None])
        if packed.fixed:
            one_by_one += [row.new_zeros(unused, *row.shape[1:]), row[bounds[-2] :]]
        both.append(torch.cat(one_by_one))
        after.append(torch.cat(last))
    old = torch.tensor([*held, *[unused] * packed.fixed], dtype=torch.int64, device=count.device)
    cu_seqlens = torch.cat([old.new_zeros(1), (old + packed.lengths).cumsum(0)])
    start = torch.cat([count - old[: packed.batch], old.new_zeros(int(packed.fixed))])
    return AppendedRows(tuple(both), tuple(after), cu_seqlens, start, count + packed.lengths[: packed.batch])
