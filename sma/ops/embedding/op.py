"""embedding: public function, checks, and registration of the backends."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.embedding import eager, reference
from sma.ops.embedding.types import Signature
from sma.ops.kernel import FLOATS, why_not_interpreted, why_not_triton

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
    dtype = weight.dtype if dtype is None else dtype
    out: Tensor = OP.run(_signature(tokens, weight, scale, dtype), tokens, weight, scale, dtype)
    return out


def _signature(tokens: Tensor, weight: Tensor, scale: float, dtype: torch.dtype) -> Signature:
    if tokens.dim() != 2 or weight.dim() != 2:
        raise ShapeError(
            f"embedding: tokens (B, L) and weight (V, D) must be matrices, got {tuple(tokens.shape)}, "
            f"{tuple(weight.shape)}"
        )
    return Signature(weight.device, weight.dtype, dtype, weight.shape[0], tokens.numel() == 0 or weight.numel() == 0)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.rows > LARGEST:
        return f"the kernel takes at most {LARGEST} rows, got {signature.rows}"
    if signature.empty:
        return "there is nothing to look up"
    if signature.dtype not in FLOATS:
        return f"the kernel returns float32, bfloat16 or float16, not {signature.dtype}"
    return why_not_triton(signature.device, signature.weight_dtype)


OP = Op("embedding", _signature)
OP.register(
    "triton",
    lazy("sma.ops.embedding.launch", "embedding"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.embedding)
OP.register("reference", reference.embedding, priority=90)
