"""expert_matmul in one launch, without waiting for the device: PyTorch's grouped_mm, or kernels of our own.

PyTorch's product runs without a look at the offsets on the host for bfloat16 on GPUs of capability 9.x only (elsewhere
it copies them to the host and loops), wants widths of whole 16 bytes, and gives an expert without rows its zero
gradient there (not on 10.x, pytorch issue 172439). Our kernels take everything else: float32 and float16, other GPUs,
any widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.backend import forced_backend
from sma.ops.kernel import capability, why_not_triton_on
from sma_modules.ops.expert_matmul import OP

# The rule between the two where both apply: PyTorch's product from so many multiplications (rows * d_in * d_out) on.
GROUPED_MM_FROM = 0
_ALIGNMENT = 8  # bfloat16 values in 16 bytes


def why_not_grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"grouped_mm multiplies bfloat16 without waiting for the device, got {x.dtype}"
    if not x.is_cuda or torch.version.hip is not None or capability(x.device.index or 0)[0] != 9:
        return f"grouped_mm waits for every device but CUDA ones of capability 9.x, got {x.device}"
    if any(width % _ALIGNMENT for width in weight.shape[1:]) or not weight.shape[1] * weight.shape[2]:
        return f"grouped_mm needs widths in multiples of {_ALIGNMENT}, got {tuple(weight.shape[1:])}"
    if x.shape[0] == 0:
        return "grouped_mm needs at least one row"
    if x.shape[0] * weight.shape[1] * weight.shape[2] < GROUPED_MM_FROM and forced_backend() != "grouped_mm":
        return f"the Triton kernels are faster below {GROUPED_MM_FROM} multiplications"
    return None


def why_not_kernels(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> str | None:
    if x.shape[0] >= 2**31:
        return f"the kernel takes fewer than 2^31 rows, got {x.shape[0]}"
    if weight.shape[1] * weight.shape[2] >= 2**31:
        return f"the kernel takes matrices of fewer than 2^31 entries, got {tuple(weight.shape[1:])}"
    return why_not_triton_on(x)


def running_ends(counts: Tensor, rows: int) -> Tensor:
    """``(E,)`` int32 running sum of ``counts``, made to ascend to the number of rows whatever the counts are."""
    ends = counts.clamp(min=0).cumsum(0).clamp(max=rows).to(torch.int32)
    ends[-1:].fill_(rows)
    return ends


@OP.backend("grouped_mm", priority=5, applies=why_not_grouped_mm)
def expert_matmul_grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    """PyTorch's grouped matrix product."""
    ends = running_ends(counts, x.shape[0]) if ends is None else ends
    out: Tensor = _ExpertMatmul.apply(x, weight, ends, True)  # type: ignore[no-untyped-call]
    return out


@OP.backend("triton", priority=10, applies=why_not_kernels)
def expert_matmul_triton(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    """Kernels whose programs find their expert by themselves."""
    ends = running_ends(counts, x.shape[0]) if ends is None else ends
    out: Tensor = _ExpertMatmul.apply(x, weight, ends, False)  # type: ignore[no-untyped-call]
    return out


def _aligned(x: Tensor) -> Tensor:
    """``x`` without gaps and beginning at a whole 16 bytes, as the product needs it; gradients may come in any form.

    A single row counts as contiguous with any stride, also 0, but the product looks at the stride.
    """
    fits = x.is_contiguous() and x.stride(-2) == x.shape[-1] and x.storage_offset() % _ALIGNMENT == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool, pytorch: bool) -> Tensor:
    """Rows times matrices, or their transposes, by PyTorch's grouped_mm or by our kernel; without a gradient."""
    if pytorch:
        weight = _aligned(weight)
        return torch._grouped_mm(_aligned(x), weight.transpose(1, 2) if transposed else weight, offs=ends)
    from sma_modules.ops.expert_matmul.triton_kernel import rows_times_matrices

    out: Tensor = rows_times_matrices(x, weight, ends, transposed)
    return out


def matrix_gradient(x: Tensor, grad: Tensor, ends: Tensor, pytorch: bool) -> Tensor:
    """``x^T grad`` over the rows of each expert."""
    if pytorch:
        return torch._grouped_mm(_aligned(x).t(), _aligned(grad), offs=ends)
    from sma_modules.ops.expert_matmul.triton_kernel import rows_times_rows

    out: Tensor = rows_times_rows(x, grad, ends)
    return out


class _ExpertMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, pytorch: bool) -> Any:
        ctx.save_for_backward(x, weight, ends)
        ctx.pytorch = pytorch
        return product(x, weight, ends, False, pytorch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, ends = ctx.saved_tensors
        grad_x = product(grad, weight, ends, True, ctx.pytorch) if ctx.needs_input_grad[0] else None
        grad_weight = matrix_gradient(x, grad, ends, ctx.pytorch) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None
