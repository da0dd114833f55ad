"""The kernel, which is one of those of the projections, as an operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sma.ops.kernel import kernel
from sma_modules.ops.gau_output.types import Around, Attended
from sma_modules.ops.gau_projections import triton_kernel as kernels
from sma_modules.ops.gau_projections.launch import rows_of, tiles

FEATURES, INNER, WARPS, STAGES = 16, 256, 4, 3
"""As of the projections; there are fewer output features here, and more input features."""


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, active: Tensor, confidence: Tensor, skip: Tensor, residual: Tensor
) -> Tensor:
    return residual.new_empty(residual.shape)


@kernel("gau_output", fake=_fake)
def run(
    x: Tensor, weight: Tensor, bias: Tensor, active: Tensor, confidence: Tensor, skip: Tensor, residual: Tensor
) -> Tensor:
    """The output ``(S, D)``."""
    out = _fake(x, weight, bias, active, confidence, skip, residual)
    (slots, h), dim, rows = x.shape, weight.shape[0], rows_of(x.shape[0])
    tensors: tuple[Any, ...] = tuple(
        each.contiguous() for each in (x, weight, bias, active, confidence, skip, residual)
    )
    kernels.output_kernel[(tiles(dim, FEATURES), tiles(slots, rows))](
        *tensors, out, slots, H=h, D=dim, BM=rows, BN=FEATURES, BK=INNER, num_warps=WARPS, num_stages=STAGES
    )
    return out


def gau_output(attended: Attended, around: Around) -> Tensor:
    """See :func:`sma_modules.ops.gau_output.gau_output`."""
    out: Tensor = run(*attended, *around)
    return out
