"""The definition: one slot and one feature at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.gau_inputs.reference import gau_inputs
from sma_modules.ops.gau_inputs.types import Affine
from sma_modules.ops.gau_projections.types import Projections, Weights


def gau_projections(m: Tensor, weights: Weights, affine: Affine, active: Tensor) -> Projections:
    """Products in float32 at least, rounded once."""
    dtype = torch.promote_types(m.dtype, torch.float32)

    def product(weight: Tensor, bias: Tensor) -> Tensor:
        rows = [
            torch.stack([(token.to(dtype) * row.to(dtype)).sum() for row in weight]) + bias.to(dtype) for token in m
        ]
        return torch.stack([*rows, bias.to(dtype)])[:-1]

    inputs = (each.to(m.dtype) for each in gau_inputs(product(weights.mx, weights.mx_bias), affine))
    return Projections(product(weights.skip, weights.skip_bias).to(m.dtype), *inputs)
