"""row_norm: normalisation over the features of each token: layer norm, RMS norm, scale norm."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, without_autocast
from sma.ops.kernel import why_not_triton_on

OP = Op("row_norm")
WIDEST = 8192
"""A token is held by one program of the kernels, and more features do not fit its registers."""


class RowNorm(NamedTuple):
    """A normalisation over the features of each token, ``weight * x / sqrt(mean(x^2) + eps) + bias``.

    Attributes:
        centred: subtract the mean first (layer norm).
        eps: added to the mean square.
        weight: ``(D,)``, ``(1,)`` or None.
        bias: ``(D,)`` or None.
    """

    centred: bool
    eps: float
    weight: Tensor | None
    bias: Tensor | None


def row_norm(x: Float[Tensor, "*rows dim"], norm: RowNorm) -> Float[Tensor, "*rows dim"]:
    """Normalise the features of each token, in float32 at least, and round once, to the dtype of ``x``.

    Autocast changes nothing: the parameters may be wider than ``x``.

    Args:
        x: ``(..., D)``.
        norm: which normalisation.

    Raises:
        ShapeError: a weight or bias does not fit ``x``.

    Example:
        >>> import torch
        >>> row_norm(torch.tensor([3.0, -3.0]), RowNorm(False, 1e-6, None, None))
        tensor([ 1.0000, -1.0000])
    """
    for name, value, sizes in (("weight", norm.weight, (1, x.shape[-1])), ("bias", norm.bias, (x.shape[-1],))):
        if value is not None and (value.dim() != 1 or value.shape[0] not in sizes):
            raise ShapeError(
                f"row_norm: {name} must be ({x.shape[-1]},) for x {tuple(x.shape)}, got {tuple(value.shape)}"
            )
    with without_autocast(x.device):
        out: Tensor = OP(x, norm)
    return out


def _why_not(x: Tensor, norm: RowNorm) -> str | None:
    if x.shape[-1] > WIDEST:
        return f"the kernel takes at most {WIDEST} features, got {x.shape[-1]}"
    return "there is nothing to compute" if x.numel() == 0 else why_not_triton_on(x)


@OP.backend("triton", priority=10, applies=_why_not)
def _triton(x: Tensor, norm: RowNorm) -> Tensor:
    from sma.ops.row_norm.triton_kernel import row_norm as run

    return run(x, norm)


from sma.ops.row_norm import eager, reference  # noqa: E402,F401  (registers the backends)
