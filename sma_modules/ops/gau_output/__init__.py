"""All that follows the attention of a gated attention unit in a step of decoding: product, confidence, sum, SiLU."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import why_not_triton_on

__all__ = ["OP", "gau_output"]

OP = Op("gau_output")


def _why_not_triton(
    x: Tensor, weight: Tensor, bias: Tensor, active: Tensor, confidence: Tensor, skip: Tensor, residual: Tensor
) -> str | None:
    if x.numel() == 0:
        return "there is nothing to compute"
    if weight.dtype != x.dtype:
        return f"the kernel takes weights of the dtype of the tokens, {x.dtype}, got {weight.dtype}"
    return why_not_triton_on(x)


@OP.backend("triton", priority=10, applies=_why_not_triton)
def _triton(
    x: Tensor, weight: Tensor, bias: Tensor, active: Tensor, confidence: Tensor, skip: Tensor, residual: Tensor
) -> Tensor:
    from sma_modules.ops.gau_output.launch import run

    out: Tensor = run(x, weight, bias, active, confidence, skip, residual)
    return out


def gau_output(
    x: Float[Tensor, "slots h"],
    weight: Float[Tensor, "dim h"],
    bias: Float[Tensor, " dim"],
    *,
    active: Bool[Tensor, " slots"],
    confidence: Float[Tensor, " slots"],
    skip: Float[Tensor, "slots dim"],
    residual: Float[Tensor, "slots dim"],
) -> Float[Tensor, "slots dim"]:
    """``silu(skip + confidence * (x W^T + b) + residual)``, without the middle term where a slot is not active.

    Args:
        x: ``(S, h)`` what the unit attended to, gated.
        weight: ``(D, h)``. Where nobody is active it is not even read.
        bias: ``(D,)``.
        active: ``(S,)``.
        confidence: ``(S,)``.
        skip: ``(S, D)``.
        residual: ``(S, D)``.

    Returns:
        ``(S, D)`` in the dtype of ``residual``.

    Raises:
        ShapeError: the sizes do not fit.
    """
    if weight.shape != (skip.shape[1], x.shape[1]) or skip.shape != residual.shape:
        raise ShapeError(
            f"gau_output: weight must be ({skip.shape[1]}, {x.shape[1]}) and skip like residual, got "
            f"{tuple(weight.shape)}, {tuple(skip.shape)} and {tuple(residual.shape)}"
        )
    out: Tensor = OP(x, weight, bias, active, confidence, skip, residual)
    return out


from sma_modules.ops.gau_output import eager, reference  # noqa: E402,F401  (registers the backends)
