"""segment_sum: public function, checks, and registration of the backends."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy, why_not_scatter
from sma.ops.segment_sum import eager, reference
from sma.ops.segment_sum.types import Signature


def segment_sum(
    x: Float[Tensor, "rows *features"], cu_seqlens: Int[Tensor, " bounds"]
) -> Float[Tensor, "batch *features"]:
    """Sum of the rows ``cu_seqlens[b]:cu_seqlens[b + 1]`` for each b; zeros for an empty sequence.

    Args:
        x: ``(K, ...)`` packed rows.
        cu_seqlens: ``(B + 1,)`` ascending, from 0 to K.

    Returns:
        ``(B, ...)`` in the dtype of ``x``, also under autocast.

    Raises:
        ShapeError: ``cu_seqlens`` is not one-dimensional with at least one entry.

    Example:
        >>> import torch
        >>> segment_sum(torch.ones(3, 1), torch.tensor([0, 2, 2, 3])).flatten()
        tensor([2., 0., 1.])
    """
    sums: Tensor = OP.run(_signature(x, cu_seqlens), x, cu_seqlens)
    return sums


def _signature(x: Tensor, cu_seqlens: Tensor) -> Signature:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ShapeError(f"segment_sum: cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    return Signature(x.device, x.dtype)


def _why_not_scatter(signature: Signature) -> str | None:
    return why_not_scatter(signature.device, signature.dtype)


OP = Op("segment_sum", _signature)
OP.register("eager", eager.segment_sum)
OP.register(
    "torch_scatter",
    lazy("sma.ops.segment_sum.torch_scatter", "segment_sum"),
    priority=60,
    applies=_why_not_scatter,
)
OP.register("reference", reference.segment_sum, priority=90)
