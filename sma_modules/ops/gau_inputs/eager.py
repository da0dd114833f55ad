"""gau_inputs with the operations of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.transforms import transformed
from sma_modules.ops.gau_inputs.types import Affine
from sma_modules.ops.rotary import rotary


def gau_inputs(mx: Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The default backend."""
    z = affine.gamma.shape[1]
    h = (mx.shape[1] - z) // 2
    sizes = (z, h, h)
    if mx.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        shared, r, v = _SiluParts.apply(mx, sizes)  # type: ignore[no-untyped-call]
    else:
        shared, r, v = F.silu(mx).split_with_sizes(sizes, dim=-1)
    q, k = queries_and_keys(shared, *affine)
    return q, k, v, r


class _SiluParts(torch.autograd.Function):
    """``SiLU(mx)`` in parts, whose gradients are not concatenated first."""

    @staticmethod
    def forward(ctx: Any, mx: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(mx)
        ctx.sizes = sizes
        return F.silu(mx).split_with_sizes(sizes, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mx,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which PyTorch's own operation of this has not
            share = torch.sigmoid(mx)
            return torch.cat(grads, -1) * share * (1 + mx * (1 - share)), None
        out = torch.empty_like(mx)
        for grad, part, own in zip(grads, *(each.split_with_sizes(ctx.sizes, -1) for each in (mx, out)), strict=True):
            torch.ops.aten.silu_backward.grad_input(grad, part, grad_input=own)
        return out, None


def queries_and_keys(
    shared: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None, theta: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(K, z)`` each from their common ``shared (K, z)``, see the operation."""
    both = (shared[:, None] * gamma + beta).to(shared.dtype)
    if position is not None:
        both = rotary(both, position, theta)
    q, k = both.unbind(1)
    return q, k
