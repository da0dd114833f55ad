"""extract: public function, checks, and registration of the backends."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy, why_not_scatter
from sma.ops.extract import eager, reference
from sma.ops.extract.types import Signature
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma.ops.packed import Packed


def extract(h: Float[Tensor, "active *features"], packed: Packed) -> Float[Tensor, "batch length *features"]:
    """Scatter packed rows back to their sequences.

    Args:
        h: ``(K, ...)``, one row per active token.
        packed: where the rows came from.

    Returns:
        ``(B, L, ...)``: ``h[k]`` at flat position ``packed.index[k]``, zeros at every other position.

    Raises:
        ShapeError: ``h`` does not have K rows.

    Example:
        >>> import torch
        >>> from sma.ops.packed import Packed
        >>> extract(torch.ones(1, 2), Packed.from_mask(torch.tensor([[False, True]])))
        tensor([[[0., 0.],
                 [1., 1.]]])
    """
    signature = _signature(h, packed)
    tokens: Tensor = h.reshape(*packed.shape, *h.shape[1:]) if packed.whole else OP.run(signature, h, packed)
    return tokens


def _signature(h: Tensor, packed: Packed) -> Signature:
    if h.shape[0] != packed.index.numel():
        raise ShapeError(
            f"extract: h must have one row for each of {packed.index.numel()} active tokens, got {h.shape[0]}"
        )
    return Signature(h.device, h.dtype, fixed=packed.overflow is not None)


OP = Op("extract", _signature)
OP.register(
    "triton",
    lazy("sma.ops.extract.launch", "extract"),
    priority=10,
    applies=lambda signature: why_not_triton(signature.device, signature.dtype),
    pays=why_not_interpreted,
)
OP.register("eager", eager.extract)
OP.register(
    "torch_scatter",
    lazy("sma.ops.extract.torch_scatter", "extract"),
    priority=60,
    applies=lambda signature: why_not_scatter(signature.device, signature.dtype, signature.fixed),
)
OP.register("reference", reference.extract, priority=90)
