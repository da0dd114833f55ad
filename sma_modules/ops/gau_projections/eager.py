"""gau_projections with the operations of PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sma.ops.backend import concrete
from sma_modules.ops.gau_inputs.eager import gau_inputs
from sma_modules.ops.gau_inputs.types import Affine
from sma_modules.ops.gau_projections.types import Projections, Weights


def gau_projections(m: Tensor, weights: Weights, affine: Affine, active: Tensor) -> Projections:
    """Two matrix products. On a CPU rows that are not active are left out of the second."""
    skip, skip_bias, mx, mx_bias = weights
    path = F.linear(m, skip, skip_bias)
    if not concrete(active) or bool(active.all()):
        return Projections(path, *gau_inputs(F.linear(m, mx, mx_bias), affine))
    rows = active.nonzero().squeeze(1)
    position = None if affine.position is None else affine.position[rows]
    some = gau_inputs(F.linear(m.index_select(0, rows), mx, mx_bias), affine._replace(position=position))
    whole = (each.new_zeros(m.shape[0], each.shape[1]).index_copy(0, rows, each) for each in some)
    return Projections(path, *whole)
