"""The kernels as operators, and their gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sma.ops.kernel import kernel
from sma.transforms import once_differentiable
from sma_modules.ops.gau_inputs import triton_kernel as kernels
from sma_modules.ops.gau_inputs.types import Affine

FORWARD_ROWS, BACKWARD_ROWS, LARGEST_FEATURES = 8, 16, 256
"""Rows of a program and features at a time: all that can be tuned."""


def _sizes(mx: Tensor, gamma: Tensor, theta: float) -> dict[str, Any]:
    z = gamma.shape[1]
    h = (mx.shape[1] - z) // 2
    return {
        "ROW": mx.stride(0) if mx.shape[0] > 1 else mx.shape[1],
        "LOG2_THETA": math.log2(theta),
        "Z": z,
        "ZP": max(2, 1 << (z - 1).bit_length()),
        "H": h,
        "BH": min(LARGEST_FEATURES, max(1, 1 << (h - 1).bit_length() if h else 1)),
    }


def _rows(mx: Tensor) -> Tensor:
    return mx if mx.stride(1) == 1 and mx.stride(0) >= mx.shape[1] else mx.contiguous()


def _fake_forward(
    mx: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None, theta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = gamma.shape[1]
    h = (mx.shape[1] - z) // 2
    narrow, wide = (mx.shape[0], z), (mx.shape[0], h)
    return mx.new_empty(narrow), mx.new_empty(narrow), mx.new_empty(wide), mx.new_empty(wide)


@kernel("gau_inputs", fake=_fake_forward)
def forward(
    mx: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None, theta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and r."""
    q, k, v, r = _fake_forward(mx, gamma, beta, position, theta)
    mx, gamma, beta = _rows(mx), gamma.contiguous(), beta.contiguous()
    if mx.shape[0]:
        kernels.forward_kernel[(-(-mx.shape[0] // FORWARD_ROWS),)](
            mx, gamma, beta, position, q, k, v, r, mx.shape[0], **_sizes(mx, gamma, theta), BM=FORWARD_ROWS
        )
    return q, k, v, r


def _fake_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dr: Tensor, mx: Tensor, gamma: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return mx.new_empty(mx.shape), gamma.new_empty(4, gamma.shape[1], dtype=torch.float32)


@kernel("gau_inputs_backward", fake=_fake_backward)
def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dr: Tensor,
    mx: Tensor,
    gamma: Tensor,
    beta: Tensor,
    position: Tensor | None,
    theta: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of mx, and those of gamma and beta as ``(4, z)`` in float32."""
    mx, gamma, beta = _rows(mx), gamma.contiguous(), beta.contiguous()
    d_mx = mx.new_empty(mx.shape)
    programs = -(-mx.shape[0] // BACKWARD_ROWS)
    partial = gamma.new_empty(programs, 4, gamma.shape[1], dtype=torch.float32)
    if programs:
        kernels.backward_kernel[(programs,)](
            mx, gamma, beta, position, dq.contiguous(), dk.contiguous(), dv.contiguous(), dr.contiguous(), d_mx,
            partial, mx.shape[0], **_sizes(mx, gamma, theta), BM=BACKWARD_ROWS,
        )  # fmt: skip
    return d_mx, partial.sum(0)


class _GauInputs(torch.autograd.Function):
    """The two operators, tied together."""

    @staticmethod
    def forward(
        ctx: Any, mx: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None, theta: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(mx, gamma, beta, position)
        ctx.theta = theta
        return forward(mx, gamma, beta, position, theta)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        mx, gamma, beta, position = ctx.saved_tensors
        d_mx, affine = backward(*grads, mx, gamma, beta, position, ctx.theta)
        return d_mx, affine[:2].to(gamma.dtype), affine[2:].to(beta.dtype), None, None


def gau_inputs(mx: Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`sma_modules.ops.gau_inputs.gau_inputs`."""
    q, k, v, r = _GauInputs.apply(mx, *affine)  # type: ignore[no-untyped-call]
    return q, k, v, r
