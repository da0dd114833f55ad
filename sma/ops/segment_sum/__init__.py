"""segment_sum: add up the rows of each sequence of a packed batch."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, without_autocast

OP = Op("segment_sum")


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
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ShapeError(f"segment_sum: cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    with without_autocast(x.device):
        out: Tensor = OP(x, cu_seqlens)
    return out


from sma.ops.segment_sum import eager, reference, torch_scatter  # noqa: E402,F401  (registers the backends)
