"""The definition of expert_matmul: one row after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_matmul(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    """Walk over experts and their rows."""
    rows, row = [x[:0] @ weight[0] + 0 * weight.sum()], 0
    for expert, count in enumerate(counts.tolist()):
        for _ in range(count):
            rows.append((x[row] @ weight[expert])[None])
            row += 1
    return torch.cat(rows)
