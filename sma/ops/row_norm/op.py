"""row_norm: public function, checks, and registration of the backends."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma.ops.row_norm import eager, reference
from sma.ops.row_norm.types import WIDEST, RowNorm, Signature


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
    out: Tensor = OP.run(_signature(x, norm), x, norm)
    return out


def _signature(x: Tensor, norm: RowNorm) -> Signature:
    width = x.shape[-1]
    for name, value, sizes in (("weight", norm.weight, (1, width)), ("bias", norm.bias, (width,))):
        if value is not None and (value.dim() != 1 or value.shape[0] not in sizes):
            raise ShapeError(f"row_norm: {name} must be ({width},) for x {tuple(x.shape)}, got {tuple(value.shape)}")
    return Signature(x.device, x.dtype, width, x.numel() == 0)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.width > WIDEST:
        return f"the kernel takes at most {WIDEST} features, got {signature.width}"
    return "there is nothing to compute" if signature.empty else why_not_triton(signature.device, signature.dtype)


OP = Op("row_norm", _signature)
OP.register(
    "triton",
    lazy("sma.ops.row_norm.launch", "row_norm"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.row_norm)
OP.register("reference", reference.row_norm, priority=90)
