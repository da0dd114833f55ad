"""pack: from a decision to the packed view that every operation works on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import why_not_triton_on

OP = Op("pack")


class PackedRows(NamedTuple):
    """Where the True entries of a mask ``(B, L)`` are.

    Attributes:
        tokens: ``(K,)`` int64, ascending: flat positions ``b * L + t``. With a capacity K is that, and rows without a
            token hold ``B * L``.
        cu_seqlens: ``(B + 1,)`` int64: sequence b owns rows ``cu_seqlens[b]:cu_seqlens[b + 1]``. With a capacity
            ``(B + 2,)``: rows without a token make up one more sequence.
        row: ``(B * L,)`` int32: the row of each token, -1 where it has none.
        position: ``(K,)`` int64: ``position[tokens]``, 0 in rows without a token.
        kept: ``(B, L)`` bool: tokens that have a row; the mask itself without a capacity.
        overflow: ``()`` int64: tokens that found no room; None without a capacity.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    row: Tensor
    position: Tensor
    kept: Tensor
    overflow: Tensor | None


def pack(
    mask: Bool[Tensor, "batch length"],
    position: Int[Tensor, "batch length"] | None = None,
    *,
    capacity: int | None = None,
    counts: Int[Tensor, " blocks"] | None = None,
) -> PackedRows:
    """Number the True entries of a mask, sequence after sequence.

    Without a capacity the number of rows is read back from the device, once. With one nothing is: shapes are static,
    and the first ``capacity`` entries are kept.

    Args:
        mask: which tokens to keep.
        position: what to call their positions; by default the column.
        capacity: how many rows there are, at least 1.
        counts: of the True entries in parts of the mask, where a kernel counted them as it made the mask
            (:class:`~sma.ops.router.Routed`).

    Raises:
        ShapeError: ``mask`` is no bool matrix, ``position`` does not fit it, or the capacity is below 1.

    Example:
        >>> rows = pack(torch.tensor([[False, True], [True, True]]))
        >>> rows.tokens.tolist(), rows.cu_seqlens.tolist(), rows.row.tolist()
        ([1, 2, 3], [0, 1, 3], [-1, 0, 1, 2])
    """
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ShapeError(f"pack: mask must be bool (B, L), got {mask.dtype} {tuple(mask.shape)}")
    if position is not None and position.shape != mask.shape:
        raise ShapeError(f"pack: position must be {tuple(mask.shape)} like the mask, got {tuple(position.shape)}")
    if capacity is not None and capacity < 1:
        raise ShapeError(f"pack: capacity must be at least 1, got {capacity}")
    rows: PackedRows = OP(mask, position, capacity, counts)
    return rows


def _why_not(mask: Tensor, position: Tensor | None, capacity: int | None, counts: Tensor | None) -> str | None:
    if mask.numel() == 0:
        return "there is nothing to pack"
    return why_not_triton_on(mask, (torch.bool,))


@OP.backend("triton", priority=10, applies=_why_not)
def _triton(mask: Tensor, position: Tensor | None, capacity: int | None, counts: Tensor | None) -> PackedRows:
    from sma.ops.pack.triton_kernel import pack as run

    return run(mask, position, capacity, counts)


from sma.ops.pack import eager, reference  # noqa: E402,F401  (registers the backends)
