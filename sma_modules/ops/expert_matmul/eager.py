"""expert_matmul as one matrix product per expert.

``torch.nn.functional.grouped_mm`` does it in one call, but on a CPU it knows no float64 and fails on an expert
without rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_matmul(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    """Experts without rows multiply nothing, which costs nothing and gives their matrix a zero gradient."""
    if torch.compiler.is_exporting():
        return _every_expert(x, weight, counts)
    groups = torch.split(x, counts.tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, weight.unbind(0), strict=True)])


def _every_expert(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """In fixed shapes, for a graph that is to run elsewhere: every expert multiplies all rows."""
    row = torch.arange(x.shape[0], device=x.device)
    expert = (row[:, None] >= counts.cumsum(0)).sum(1)
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for number, matrix in enumerate(weight.unbind(0)):
        out = torch.where((expert == number)[:, None], x @ matrix, out)
    return out
