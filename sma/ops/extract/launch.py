"""extract by the kernels of compress: every token takes its row, or zeros, in one pass. Its gradient is compress."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.compress.launch import flat, take
from sma.ops.packed import Packed
from sma.transforms import once_differentiable


class _Extract(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, index: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = h.shape
        out: Tensor = take(flat(h, index.numel()), row)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return take(grad.contiguous(), index).view(ctx.shape), None, None


def extract(h: Tensor, packed: Packed) -> Tensor:
    """See :func:`sma.ops.extract.extract`."""
    out: Tensor = _Extract.apply(h, packed.index, packed.row)  # type: ignore[no-untyped-call]
    return out.view(*packed.shape, *h.shape[1:])
