"""The definition: one slot and one feature at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.gau_inputs.reference import gau_inputs_reference
from sma_modules.ops.gau_projections import OP, Affine, Linear, Projections


@OP.backend("reference", priority=90)
def gau_projections_reference(m: Tensor, skip: Linear, mx: Linear, affine: Affine, active: Tensor) -> Projections:
    """Products in float32 at least, rounded once."""
    dtype = torch.promote_types(m.dtype, torch.float32)

    def product(linear: Linear) -> Tensor:
        rows = [
            torch.stack([(token.to(dtype) * row.to(dtype)).sum() for row in linear.weight]) + linear.bias.to(dtype)
            for token in m
        ]
        return torch.stack([*rows, linear.bias.to(dtype)])[:-1]

    inputs = (each.to(m.dtype) for each in gau_inputs_reference(product(mx), *affine))
    return Projections(product(skip).to(m.dtype), *inputs)
