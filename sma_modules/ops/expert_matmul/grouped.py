"""expert_matmul by PyTorch's grouped product, without synchronising with the device.

It reads no offset on the host for bfloat16 on GPUs of capability 9.x only (elsewhere it copies them to the host and
loops), needs widths of whole 16 bytes, and gives an expert without rows its zero gradient there (not on 10.x, pytorch
issue 172439). The Triton kernels take everything else: float32 and float16, other GPUs, any widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.transforms import once_differentiable

ALIGNMENT = 8
"""bfloat16 values in 16 bytes."""


def running_ends(counts: Tensor, rows: int) -> Tensor:
    """``(E,)`` int32 running sum of ``counts``, made to ascend to the number of rows whatever the counts are."""
    ends = counts.clamp(min=0).cumsum(0).clamp(max=rows).to(torch.int32)
    ends[-1:].fill_(rows)
    return ends


def _aligned(x: Tensor) -> Tensor:
    """``x`` without gaps and beginning at a whole 16 bytes, as the product needs it; gradients may come in any form.

    A single row counts as contiguous with any stride, also 0, but the product reads the stride.
    """
    fits = x.is_contiguous() and x.stride(-2) == x.shape[-1] and x.storage_offset() % ALIGNMENT == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def rows_times_matrices(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """``x (R, d_in) @ weight (E, d_in, d_out)``, or transposed ``x (R, d_out) @ weight^T``, row by row."""
    weight = _aligned(weight)
    return torch._grouped_mm(_aligned(x), weight.transpose(1, 2) if transposed else weight, offs=ends)


def rows_times_rows(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """``(E, d_in, d_out)``: for each expert ``x^T grad`` over its rows of ``x (R, d_in)`` and ``grad (R, d_out)``."""
    return torch._grouped_mm(_aligned(x).t(), _aligned(grad), offs=ends)


class _ExpertMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Any:
        ctx.save_for_backward(x, weight, ends)
        return rows_times_matrices(x, weight, ends, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, ends = ctx.saved_tensors
        grad_x = rows_times_matrices(grad, weight, ends, True) if ctx.needs_input_grad[0] else None
        return grad_x, rows_times_rows(x, grad, ends) if ctx.needs_input_grad[1] else None, None


def expert_matmul(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    """PyTorch's grouped matrix product."""
    ends = running_ends(counts, x.shape[0]) if ends is None else ends
    out: Tensor = _ExpertMatmul.apply(x, weight, ends)  # type: ignore[no-untyped-call]
    return out
