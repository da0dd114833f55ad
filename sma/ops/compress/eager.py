"""compress as one gather. Its backward adds at distinct rows, so it is deterministic."""

from typing import Any

import torch
from torch import Tensor

from sma.ops.packed import Packed
from sma.transforms import transformed


def compress(x: Tensor, packed: Packed) -> Tensor:
    """One ``index_select`` over the flattened batch."""
    flat = x.flatten(0, 1)
    if not packed.fixed:
        return flat.index_select(0, packed.index)
    if not flat.shape[0]:
        return flat.new_zeros(packed.index.numel(), *flat.shape[1:]) + flat.sum()
    rows = flat.index_select(0, packed.index.clamp(max=flat.shape[0] - 1))
    empty = packed.index == flat.shape[0]
    return rows.masked_fill(empty.view(-1, *(1,) * (x.dim() - 2)), 0)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, index), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (grad, through), (index,) = grads, ctx.saved_tensors
        if grad is None:
            return through, None
        through = grad.new_zeros(ctx.shape) if through is None else through.contiguous()
        flat = through.flatten(0, 1)
        if torch.is_grad_enabled():  # a gradient of this gradient may be asked for
            return flat.index_add(0, index, grad).view(ctx.shape), None
        flat.index_add_(0, index, grad)
        return through, None


def compress_through(x: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """See :func:`sma.ops.compress.compress_through`; the gradient is added in place on a CPU, without a capacity."""
    by_hand = x.device.type == "cpu" and packed.overflow is None and not torch.compiler.is_compiling()
    if not by_hand or transformed():
        return compress(x, packed), x
    return _Through.apply(x, packed.index)  # type: ignore[no-any-return,no-untyped-call]
