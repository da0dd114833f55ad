"""narrow_linear as a matrix product."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.transforms import transformed


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """A matrix product in float32 at least; padding is set to zero in front of it, where NaN would spread."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    plain = valid is None and x.dtype == weight.dtype == wide
    if plain and x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        return _Through.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    inner = x if valid is None else x.masked_fill(~valid[..., None], 0)
    out = F.linear(inner.to(wide), weight.to(wide), bias.to(wide))
    return out if valid is None else out.masked_fill(~valid[..., None], 0), x


class _Through(torch.autograd.Function):
    """The gradient of the outputs is added in place to the one that passes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad, through), (x, weight) = grads, ctx.saved_tensors
        if grad is None:
            return through, torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
        rows = grad.flatten(0, 1)
        if through is None:
            through = grad @ weight
        elif torch.is_grad_enabled():  # a gradient of this gradient may be asked for
            through = through + grad @ weight
        else:
            through = through.contiguous()
            through.flatten(0, 1).addmm_(rows, weight)
        return through, rows.t() @ x.flatten(0, 1), rows.sum(0)
