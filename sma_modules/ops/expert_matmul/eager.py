"""expert_matmul as one matrix product per expert.

``torch.nn.functional.grouped_mm`` does it in one call, but on a CPU it knows no float64 and fails on an expert
without rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.expert_matmul import OP


@OP.backend("eager")
def expert_matmul(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    """Experts without rows multiply nothing, which costs nothing and gives their matrix a zero gradient."""
    groups = torch.split(x, counts.tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, weight.unbind(0), strict=True)])
