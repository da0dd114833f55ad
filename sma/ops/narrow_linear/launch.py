"""Launches of the kernels of narrow_linear as operators, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.narrow_linear.triton_kernel import backward_kernel, forward_kernel
from sma.ops.row_norm.launch import total as sum_of
from sma.transforms import once_differentiable

BLOCK_D = 128
BLOCK_T = 8
WARPS = 4
TOKENS_PER_PROGRAM = 256
"""Tokens over which a program of the backward pass adds up the gradient of the weights."""


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0], dtype=torch.float32)


@kernel("narrow_linear_forward", fake=_forward_fake)
def forward(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> Tensor:
    """``(B, L, C)`` float32 of contiguous inputs."""
    out = _forward_fake(x, weight, bias, valid)
    tokens, d = x.shape[0] * x.shape[1], x.shape[2]
    forward_kernel[(cdiv(tokens, BLOCK_T),)](
        x,
        weight,
        bias,
        x if valid is None else valid,
        out,
        tokens,
        d,
        C=weight.shape[0],
        HAS_VALID=valid is not None,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        num_warps=WARPS,
    )
    return out


def _backward_fake(
    x: Tensor, weight: Tensor, grad_out: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0])


@kernel("narrow_linear_backward", fake=_backward_fake)
def backward(x: Tensor, weight: Tensor, grad_out: Tensor, through: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, weight and bias; ``through`` is left alone."""
    return _backward(x, weight, grad_out, None if through is None else through.clone())


def _backward(x: Tensor, weight: Tensor, grad_out: Tensor, through: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same; ``through`` becomes the gradient of x."""
    grad_x = torch.empty_like(x) if through is None else through
    tokens, (outputs, d) = x.shape[0] * x.shape[1], weight.shape
    programs = cdiv(tokens, TOKENS_PER_PROGRAM)
    grad_weight = weight.new_empty(programs, outputs, d, dtype=torch.float32)
    grad_bias = weight.new_empty(programs, outputs, dtype=torch.float32)
    backward_kernel[(programs, cdiv(d, BLOCK_D))](
        x,
        weight,
        grad_out,
        grad_x,
        grad_weight,
        grad_bias,
        tokens,
        TOKENS_PER_PROGRAM // BLOCK_T,
        d,
        C=outputs,
        PADDED_C=next_power_of_2(outputs),
        HAS_THROUGH=through is not None,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        num_warps=WARPS,
    )
    return grad_x, sum_of(grad_weight, weight), sum_of(grad_bias, weight[:, 0])


class _NarrowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, valid)
        return forward(x, weight, bias, valid), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, through: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, valid = ctx.saved_tensors
        if grad_out is None:
            return through, torch.zeros_like(weight), weight.new_zeros(weight.shape[0]), None
        grad_out = grad_out.contiguous()
        if valid is not None:
            grad_out = grad_out.masked_fill(~valid[..., None], 0)
        run = backward if torch.compiler.is_compiling() else _backward
        return *run(x, weight, grad_out, None if through is None else through.contiguous()), None


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`sma.ops.narrow_linear.narrow_linear`."""
    valid = None if valid is None else valid.contiguous()
    return _NarrowLinear.apply(x.contiguous(), weight.contiguous(), bias, valid)  # type: ignore[no-any-return,no-untyped-call]
