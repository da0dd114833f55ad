"""The definition of pack, token by token."""

import torch
from torch import Tensor

from sma.ops.pack.types import PackedRows


def pack(mask: Tensor, position: Tensor | None, capacity: int | None, counts: Tensor | None) -> PackedRows:
    """Walk over the mask and hand out rows."""
    batch, length = mask.shape
    index: list[int] = []
    where: list[int] = []
    bounds, row, overflow = [0], [-1] * (batch * length), 0
    for b in range(batch):
        for t in range(length):
            if not mask[b, t]:
                continue
            if capacity is not None and len(index) == capacity:
                overflow += 1
                continue
            row[b * length + t] = len(index)
            index.append(b * length + t)
            where.append(t if position is None else int(position[b, t]))
        bounds.append(len(index))
    spare = 0 if capacity is None else capacity - len(index)
    index += [batch * length] * spare
    where += [0] * spare
    if capacity is not None:
        bounds.append(capacity)

    def integers(values: list[int] | int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=mask.device)

    return PackedRows(
        integers(index),
        integers(bounds),
        torch.tensor(row, dtype=torch.int32, device=mask.device),
        integers(where),
        torch.tensor([each >= 0 for each in row], dtype=torch.bool, device=mask.device).view(mask.shape),
        None if capacity is None else integers(overflow),
    )
