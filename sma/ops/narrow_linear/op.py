"""narrow_linear: public function, checks, and registration of the backends."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma.ops.narrow_linear import eager, reference
from sma.ops.narrow_linear.types import WIDEST, Signature


def narrow_linear(
    x: Float[Tensor, "batch length d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"],
    valid: Bool[Tensor, "batch length"] | None = None,
) -> tuple[Float[Tensor, "batch length d_out"], Float[Tensor, "batch length d_in"]]:
    """``x W^T + b`` of the real tokens, and ``x`` itself, passed through.

    A caller that continues with the returned ``x`` gives this operation the gradient of everything else. The gradient
    of the outputs is added to it in place, and only in rows where that is not zero: for a router, at active tokens.
    The returned ``x`` must therefore go into one function only, whose gradient is a tensor of its own: a matrix
    product, or :func:`~sma.ops.compress.compress`.

    Args:
        x: ``(B, L, D)``; padding may hold anything, also NaN.
        weight: ``(C, D)``.
        bias: ``(C,)``.
        valid: ``(B, L)`` real tokens; None means all.

    Returns:
        ``(B, L, C)``, 0 at padding, in float32 (float64 for float64 inputs) also under autocast; and ``x``.

    Raises:
        ShapeError: the sizes do not fit.

    Example:
        >>> import torch
        >>> out, x = narrow_linear(torch.ones(1, 2, 3), torch.ones(1, 3), torch.zeros(1))
        >>> out.flatten().tolist()
        [3.0, 3.0]
    """
    out: tuple[Tensor, Tensor] = OP.run(_signature(x, weight, bias, valid), x, weight, bias, valid)
    return out


def _signature(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> Signature:
    if x.dim() != 3 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ShapeError(
            "narrow_linear: x (B, L, D), weight (C, D) and bias (C,) must agree, "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return Signature(x.device, x.dtype, weight.dtype, weight.shape[0], x.numel() == 0 or weight.numel() == 0)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.outputs > WIDEST:
        return f"the kernel has at most {WIDEST} outputs, got {signature.outputs}"
    if signature.empty:
        return "there is nothing to compute"
    return why_not_triton(signature.device, signature.dtype, signature.weight_dtype)


OP = Op("narrow_linear", _signature)
OP.register(
    "triton",
    lazy("sma.ops.narrow_linear.launch", "narrow_linear"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.narrow_linear)
OP.register("reference", reference.narrow_linear, priority=90)
