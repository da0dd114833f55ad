"""extract: put the rows of a compressed sequence back where they came from, zeros elsewhere (paper, section 3.1)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, without_autocast
from sma.ops.kernel import why_not_triton_on
from sma.ops.packed import Packed

OP = Op("extract")


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
    if h.shape[0] != packed.index.numel():
        raise ShapeError(
            f"extract: h must have one row for each of {packed.index.numel()} active tokens, got {h.shape[0]}"
        )
    if packed.whole:
        return h.reshape(*packed.shape, *h.shape[1:])
    with without_autocast(h.device):
        out: Tensor = OP(h, packed)
    return out


@OP.backend("triton", priority=10, applies=lambda h, packed: why_not_triton_on(h))
def _triton(h: Tensor, packed: Packed) -> Tensor:
    from sma.ops.extract.triton_kernel import extract as run

    return run(h, packed)


from sma.ops.extract import eager, reference, torch_scatter  # noqa: E402,F401  (registers the backends)
