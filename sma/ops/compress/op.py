"""compress: public functions, checks, and registration of the backends."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy, why_not_scatter
from sma.ops.compress import eager, reference
from sma.ops.compress.types import Signature
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma.ops.packed import Packed


def compress(x: Float[Tensor, "batch length *features"], packed: Packed) -> Float[Tensor, "active *features"]:
    """Select the active tokens.

    Args:
        x: ``(B, L, ...)``, one row per token.
        packed: which tokens are active.

    Returns:
        ``(K, ...)``: row k is ``x`` at flat position ``packed.index[k]``; zeros in rows without a token.

    Raises:
        ShapeError: ``x`` does not have the ``(B, L)`` that was packed.

    Example:
        >>> import torch
        >>> from sma.ops.packed import Packed
        >>> x = torch.arange(6.0).reshape(1, 3, 2)
        >>> compress(x, Packed.from_mask(torch.tensor([[True, False, True]])))
        tensor([[0., 1.],
                [4., 5.]])
    """
    signature = _signature(x, packed)
    tokens: Tensor = _copied(x) if packed.whole else OP.run(signature, x, packed)
    return tokens


def compress_through(
    x: Float[Tensor, "batch length *features"], packed: Packed
) -> tuple[Float[Tensor, "active *features"], Float[Tensor, "batch length *features"]]:
    """:func:`compress`, and ``x`` itself, passed through.

    A caller that continues with the returned ``x`` gives this operation the gradient of everything else. The gradient
    of the tokens is added to its rows in place, so that no tensor of the size of ``x`` has to be filled with zeros.
    The returned ``x`` must therefore go into one function only, whose gradient is a tensor of its own: a matrix
    product.

    Raises:
        ShapeError: ``x`` does not have the ``(B, L)`` that was packed.
    """
    signature = _signature(x, packed)
    if packed.whole:
        return _copied(x), x
    through = OP.chosen(signature).capabilities.get("through")
    if through is None:
        return OP.run(signature, x, packed), x
    return through(x, packed)  # type: ignore[no-any-return]


def _copied(x: Tensor) -> Tensor:
    """All tokens, in a tensor that a module may change."""
    return x.flatten(0, 1).clone(memory_format=torch.contiguous_format)


def _signature(x: Tensor, packed: Packed) -> Signature:
    if tuple(x.shape[:2]) != packed.shape:
        raise ShapeError(f"compress: x must begin with (B, L) = {packed.shape} as packed, got {tuple(x.shape)}")
    return Signature(x.device, x.dtype, fixed=packed.overflow is not None)


OP = Op("compress", _signature)
"""Capability ``through``: :func:`compress_through` in one function of autograd."""
OP.register(
    "triton",
    lazy("sma.ops.compress.launch", "compress"),
    priority=10,
    applies=lambda signature: why_not_triton(signature.device, signature.dtype),
    pays=why_not_interpreted,
    capabilities={"through": lazy("sma.ops.compress.launch", "compress_through")},
)
OP.register("eager", eager.compress, capabilities={"through": eager.compress_through})
OP.register(
    "torch_scatter",
    lazy("sma.ops.compress.torch_scatter", "compress"),
    priority=60,
    applies=lambda signature: why_not_scatter(signature.device, signature.dtype, signature.fixed),
)
OP.register("reference", reference.compress, priority=90)
