"""The kernel as an operator."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sma.ops.kernel import kernel
from sma_modules.ops.gau_inputs.types import Affine
from sma_modules.ops.gau_projections import triton_kernel as kernels
from sma_modules.ops.gau_projections.types import Projections, Weights

FEATURES, INNER, WARPS, STAGES = 32, 128, 4, 4
"""Output features of a program, input features at a time, and how many of these are on their way."""
MOST_ROWS = 64


def rows_of(slots: int) -> int:
    """Slots of a program: at least what a tensor core takes."""
    return min(MOST_ROWS, max(16, 1 << (slots - 1).bit_length()))


def tiles(features: int, tile: int = FEATURES) -> int:
    """How many programs share so many features."""
    return -(-features // tile)


def _fake(
    m: Tensor, skip_weight: Tensor, skip_bias: Tensor, mx_weight: Tensor, mx_bias: Tensor, gamma: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots, z = m.shape[0], gamma.shape[1]
    h = (mx_weight.shape[0] - z) // 2
    widths = (skip_weight.shape[0], z, z, h, h)
    skip, q, k, v, r = (m.new_empty(slots, width) for width in widths)
    return skip, q, k, v, r


@kernel("gau_projections", fake=_fake)
def run(
    m: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    mx_weight: Tensor,
    mx_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    position: Tensor | None,
    theta: float,
    active: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """skip, q, k, v and r."""
    m = m.contiguous()
    skip, q, k, v, r = _fake(m, skip_weight, skip_bias, mx_weight, mx_bias, gamma)
    (slots, dim), z, h = m.shape, q.shape[1], v.shape[1]
    sizes = {"SKIPS": tiles(skip.shape[1]), "SHARED": tiles(z), "WIDE": tiles(h)}
    programs = sizes["SKIPS"] + sizes["SHARED"] + 2 * sizes["WIDE"]
    rows = rows_of(slots)
    kernels.projection_kernel[(programs, tiles(slots, rows))](
        m, skip_weight.contiguous(), skip_bias, mx_weight.contiguous(), mx_bias, gamma, beta, position, active,
        skip, q, k, v, r, slots,
        D=dim, OUT=skip.shape[1], Z=z, H=h, LOG2_THETA=math.log2(theta), **sizes,
        BM=rows, BN=FEATURES, BK=INNER, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return skip, q, k, v, r


def gau_projections(m: Tensor, weights: Weights, affine: Affine, active: Tensor) -> Projections:
    """See :func:`sma_modules.ops.gau_projections.gau_projections`."""
    gamma, beta = affine.gamma.contiguous(), affine.beta.contiguous()
    return Projections(*run(m, *weights, gamma, beta, affine.position, affine.theta, active))
