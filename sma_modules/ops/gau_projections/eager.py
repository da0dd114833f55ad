"""The projections by PyTorch's own functions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sma.ops.backend import concrete
from sma_modules.ops.gau_inputs.eager import gau_inputs_eager
from sma_modules.ops.gau_projections import OP, Affine, Linear, Projections


@OP.backend("eager")
def gau_projections_eager(m: Tensor, skip: Linear, mx: Linear, affine: Affine, active: Tensor) -> Projections:
    """Two matrix products. On a CPU rows that are not active are left out of the second."""
    path = F.linear(m, *skip)
    if not concrete(active) or bool(active.all()):
        return Projections(path, *gau_inputs_eager(F.linear(m, *mx), *affine))
    rows = active.nonzero().squeeze(1)
    position = None if affine.position is None else affine.position[rows]
    some = gau_inputs_eager(F.linear(m.index_select(0, rows), *mx), *affine._replace(position=position))
    whole = (each.new_zeros(m.shape[0], each.shape[1]).index_copy(0, rows, each) for each in some)
    return Projections(path, *whole)
