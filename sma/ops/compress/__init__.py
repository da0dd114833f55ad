"""compress: bring the active tokens of every sequence together, in order (paper, section 3.1).

The inverse is :func:`sma.ops.extract.extract`; each is the other's gradient, and both only move data.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, without_autocast
from sma.ops.kernel import why_not_triton_on
from sma.ops.packed import Packed

OP = Op("compress")


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
    _check(x, packed)
    if packed.whole:
        return _copied(x)
    with without_autocast(x.device):
        out: Tensor = OP(x, packed)
    return out


def compress_through(
    x: Float[Tensor, "batch length *features"], packed: Packed
) -> tuple[Float[Tensor, "active *features"], Float[Tensor, "batch length *features"]]:
    """:func:`compress`, and ``x`` itself, passed through.

    Whoever goes on with the ``x`` that is returned lets the gradient of everything else arrive here, and the gradient
    of the tokens is added to its rows in place: nothing of the size of x is filled with zeros and added. For that the
    ``x`` that is returned must go into one function only, whose gradient is a tensor of its own (a matrix product).

    Raises:
        ShapeError: ``x`` does not have the ``(B, L)`` that was packed.
    """
    _check(x, packed)
    if packed.whole:
        return _copied(x), x
    backend = OP.choose(x, packed).name
    if backend == "triton":
        from sma.ops.compress.triton_kernel import compress_through as run

        return run(x, packed)
    if backend == "eager" and x.device.type == "cpu" and not packed.fixed and not torch.compiler.is_compiling():
        return eager.compress_through(x, packed)
    with without_autocast(x.device):
        return OP(x, packed), x


def _copied(x: Tensor) -> Tensor:
    """All tokens, for a module to do with as it likes."""
    return x.flatten(0, 1).clone(memory_format=torch.contiguous_format)


def _check(x: Tensor, packed: Packed) -> None:
    if tuple(x.shape[:2]) != packed.shape:
        raise ShapeError(f"compress: x must begin with (B, L) = {packed.shape} as packed, got {tuple(x.shape)}")


@OP.backend("triton", priority=10, applies=lambda x, packed: why_not_triton_on(x))
def _triton(x: Tensor, packed: Packed) -> Tensor:
    from sma.ops.compress.triton_kernel import compress as run

    return run(x, packed)


from sma.ops.compress import eager, reference, torch_scatter  # noqa: E402,F401  (registers the backends)
