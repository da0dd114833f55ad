"""pack by counting along the mask."""

import torch
from torch import Tensor

from sma.ops.pack.types import PackedRows


def pack(mask: Tensor, position: Tensor | None, capacity: int | None, counts: Tensor | None) -> PackedRows:
    """One search for the True entries; with a capacity a running count instead, which looks at no value."""
    length = mask.shape[1]
    flat = mask.reshape(-1)
    lengths = mask.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if capacity is None:
        index = flat.nonzero().squeeze(-1)
        row = torch.full((flat.numel(),), -1, dtype=torch.int32, device=mask.device)
        row = row.index_copy(0, index, torch.arange(index.numel(), dtype=torch.int32, device=mask.device))
        where = index % max(length, 1) if position is None else position.reshape(-1)[index]
        return PackedRows(index, cu_seqlens, row, where, mask, None)
    rank = flat.cumsum(0) - 1
    kept = flat & (rank < capacity)
    # Tokens without a row go to one more row behind the last, which is cut off.
    target = torch.where(kept, rank, capacity)
    token = torch.arange(flat.numel(), device=mask.device)
    where = token % max(length, 1) if position is None else position.reshape(-1)
    index = torch.full((capacity + 1,), flat.numel(), device=mask.device).index_copy(0, target, token)[:-1]
    positions = torch.zeros(capacity + 1, dtype=torch.int64, device=mask.device).index_copy(0, target, where)[:-1]
    row = torch.where(kept, rank, -1).to(torch.int32)
    overflow = (cu_seqlens[-1] - capacity).clamp(min=0)
    cu_seqlens = torch.cat([cu_seqlens.clamp(max=capacity), cu_seqlens.new_full((1,), capacity)])
    return PackedRows(index, cu_seqlens, row, positions, kept.view(mask.shape), overflow)
