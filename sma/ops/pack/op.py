"""pack: public function, checks, and registration of the backends."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma.ops.pack import eager, reference
from sma.ops.pack.types import PackedRows, Signature
from sma.transforms import refuse_vmap, transformed


def pack(
    mask: Bool[Tensor, "batch length"],
    position: Int[Tensor, "batch length"] | None = None,
    *,
    capacity: int | None = None,
    counts: Int[Tensor, " blocks"] | None = None,
) -> PackedRows:
    """Number the True entries of a mask, sequence after sequence.

    Without a capacity the number of rows is read from the device, which synchronises with it once. With one all shapes
    are static, nothing is read, and the first ``capacity`` entries are kept.

    Args:
        mask: which tokens to keep.
        position: what to call their positions; by default the column.
        capacity: how many rows there are, at least 1.
        counts: of the True entries in parts of the mask, where a kernel counted them as it made the mask
            (:class:`~sma.ops.router.Routed`).

    Raises:
        BackendError: the mask is mapped over by ``torch.vmap``.
        ShapeError: ``mask`` is no bool matrix, ``position`` does not fit it, or the capacity is below 1.

    Example:
        >>> rows = pack(torch.tensor([[False, True], [True, True]]))
        >>> rows.tokens.tolist(), rows.cu_seqlens.tolist(), rows.row.tolist()
        ([1, 2, 3], [0, 1, 3], [-1, 0, 1, 2])
    """
    if transformed():
        refuse_vmap("pack", mask)
    rows: PackedRows = OP.run(_signature(mask, position, capacity, counts), mask, position, capacity, counts)
    return rows


def _signature(mask: Tensor, position: Tensor | None, capacity: int | None, counts: Tensor | None) -> Signature:
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ShapeError(f"pack: mask must be bool (B, L), got {mask.dtype} {tuple(mask.shape)}")
    if position is not None and position.shape != mask.shape:
        raise ShapeError(f"pack: position must be {tuple(mask.shape)} like the mask, got {tuple(position.shape)}")
    if capacity is not None and capacity < 1:
        raise ShapeError(f"pack: capacity must be at least 1, got {capacity}")
    return Signature(mask.device, mask.numel() == 0)


def _why_not_triton(signature: Signature) -> str | None:
    return "there is nothing to pack" if signature.empty else why_not_triton(signature.device)


OP = Op("pack", _signature)
OP.register(
    "triton",
    lazy("sma.ops.pack.launch", "pack"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.pack)
OP.register("reference", reference.pack, priority=90)
