"""embedding: rows of a table, in the dtype that they are needed in, and a gradient whose sums are in order."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import FLOATS, why_not_triton_on

OP = Op("embedding")
LARGEST = 1024
"""Up to this many rows the gradient is a product with the tokens as rows of an identity; more have to be sorted."""


def embedding(
    tokens: Integer[Tensor, "batch length"],
    weight: Float[Tensor, "rows dim"],
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch length dim"]:
    """``scale * weight[tokens]``, rounded once.

    Args:
        tokens: ``(B, L)`` numbers of rows. On a GPU a number that is out of range gives zeros, or is an error of the
            device.
        weight: ``(V, D)``.
        scale: of the rows.
        dtype: of the result; None for that of the weight. The gradient of the weight is summed in float32 either way.

    Raises:
        ShapeError: ``tokens`` or ``weight`` is no matrix.

    Example:
        >>> embedding(torch.tensor([[2, 0]]), torch.eye(3), scale=2.0)
        tensor([[[0., 0., 2.],
                 [2., 0., 0.]]])
    """
    if tokens.dim() != 2 or weight.dim() != 2:
        raise ShapeError(
            f"embedding: tokens (B, L) and weight (V, D) must be matrices, got {tuple(tokens.shape)}, "
            f"{tuple(weight.shape)}"
        )
    out: Tensor = OP(tokens, weight, scale, weight.dtype if dtype is None else dtype)
    return out


def _why_not(tokens: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> str | None:
    if weight.shape[0] > LARGEST:
        return f"the kernel takes at most {LARGEST} rows, got {weight.shape[0]}"
    if tokens.numel() == 0 or weight.numel() == 0:
        return "there is nothing to look up"
    if dtype not in FLOATS:
        return f"the kernel gives float32, bfloat16 or float16, not {dtype}"
    return why_not_triton_on(weight)


@OP.backend("triton", priority=10, applies=_why_not)
def _triton(tokens: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    from sma.ops.embedding.triton_kernel import embedding as run

    return run(tokens, weight, scale, dtype)


from sma.ops.embedding import eager, reference  # noqa: E402,F401  (registers the backends)
