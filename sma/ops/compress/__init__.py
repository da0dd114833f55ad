"""compress: bring the active tokens of every sequence together, in order (paper, section 3.1).

The inverse is :func:`sma.ops.extract.extract`; each is the other's gradient, and both only move data.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.routing import Packed

OP = Op("compress")


def compress(x: Float[Tensor, "batch length *features"], packed: Packed) -> Float[Tensor, "active *features"]:
    """Select the active tokens.

    Args:
        x: ``(B, L, ...)``, one row per token.
        packed: which tokens are active.

    Returns:
        ``(K, ...)``: row k is ``x`` at flat position ``packed.index[k]``.

    Raises:
        ShapeError: ``x`` does not have the ``(B, L)`` that was packed.

    Example:
        >>> import torch
        >>> from sma.routing import Packed
        >>> x = torch.arange(6.0).reshape(1, 3, 2)
        >>> compress(x, Packed.from_mask(torch.tensor([[True, False, True]])))
        tensor([[0., 1.],
                [4., 5.]])
    """
    if tuple(x.shape[:2]) != packed.shape:
        raise ShapeError(f"compress: x must begin with (B, L) = {packed.shape} as packed, got {tuple(x.shape)}")
    out: Tensor = OP(x, packed)
    return out


from sma.ops.compress import eager, reference, torch_scatter  # noqa: E402,F401  (registers the backends)
