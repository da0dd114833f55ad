"""gau_output: product, confidence, sum and SiLU; checks, and the choice of a backend."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma_modules.ops.gau_output import eager, reference
from sma_modules.ops.gau_output.types import Around, Attended, Signature


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
        x: ``(S, h)`` the gated output of attention.
        weight: ``(D, h)``. The kernel does not read it where no slot is active.
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
    attended, around = Attended(x, weight, bias), Around(active, confidence, skip, residual)
    return OP.chosen(_signature(attended, around)).run(attended, around)  # type: ignore[no-any-return]


def _signature(attended: Attended, around: Around) -> Signature:
    x = attended.x
    return Signature(x.device, x.dtype, attended.weight.dtype, x.numel() == 0)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.empty:
        return "there is nothing to compute"
    if signature.weight != signature.dtype:
        return f"the kernel takes weights of the dtype of the tokens, {signature.dtype}, got {signature.weight}"
    return why_not_triton(signature.device, signature.dtype)


OP = Op("gau_output", _signature)
OP.register(
    "triton",
    lazy("sma_modules.ops.gau_output.launch", "gau_output"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.gau_output)
OP.register("reference", reference.gau_output, priority=90)
