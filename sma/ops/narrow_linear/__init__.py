"""narrow_linear: a linear map to a handful of outputs, in float32 at least: the logits of a router."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, without_autocast
from sma.ops.kernel import why_not_triton_on

OP = Op("narrow_linear")
WIDEST = 8
"""Up to this many outputs the kernel reads its input once; more are better off with a matrix product."""


def narrow_linear(
    x: Float[Tensor, "batch length d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"],
    valid: Bool[Tensor, "batch length"] | None = None,
) -> tuple[Float[Tensor, "batch length d_out"], Float[Tensor, "batch length d_in"]]:
    """``x W^T + b`` of the real tokens, and ``x`` itself, passed through.

    Whoever goes on with the ``x`` that is returned instead of the one that was given lets the gradient of everything
    else arrive here: the gradient of the few outputs is then added to it in place, and only in rows where it is not
    zero. For a router these are the active tokens. As it is done in place, the ``x`` that is returned must go into one
    function only, whose gradient is a tensor of its own: a matrix product, or :func:`~sma.ops.compress.compress`.

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
    if x.dim() != 3 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ShapeError(
            "narrow_linear: x (B, L, D), weight (C, D) and bias (C,) must agree, "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    with without_autocast(x.device):
        out: tuple[Tensor, Tensor] = OP(x, weight, bias, valid)
    return out


def _why_not(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> str | None:
    if weight.shape[0] > WIDEST:
        return f"the kernel has at most {WIDEST} outputs, got {weight.shape[0]}"
    if x.numel() == 0 or weight.numel() == 0:
        return "there is nothing to compute"
    return why_not_triton_on(x) or why_not_triton_on(weight)


@OP.backend("triton", priority=10, applies=_why_not)
def _triton(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    from sma.ops.narrow_linear.triton_kernel import narrow_linear as run

    return run(x, weight, bias, valid)


from sma.ops.narrow_linear import eager, reference  # noqa: E402,F401  (registers the backends)
