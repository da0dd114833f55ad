"""append: public function, checks, and registration of the backends."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.append import eager, reference
from sma.ops.append.types import AppendedRows, Signature
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma.ops.packed import Packed


def append(
    remembered: tuple[Tensor, ...], count: Int[Tensor, " batch"], rows: tuple[Tensor, ...], packed: Packed
) -> AppendedRows:
    """Put new rows behind remembered ones.

    Without a fixed number of new rows the number of all rows is read from the device, which synchronises with it once.
    With one nothing is read: there are ``B * capacity + K`` rows. Those that no sequence needs belong to the sequence
    of the rows without a token, the last one, and hold copies of remembered rows.

    Args:
        remembered: per kind of row ``(B, capacity, ...)``, the newest last.
        count: ``(B,)`` int64: how many rows each stream has had; where these are fewer than the capacity, only so many
            are remembered.
        rows: per kind of row ``(K, ...)``, in whose dtype everything is returned.
        packed: which sequences they belong to.

    Raises:
        ShapeError: there is no kind of row, or the shapes do not fit.

    Example:
        >>> packed = Packed.from_mask(torch.tensor([[True, True], [False, True]]))
        >>> before, new = torch.tensor([[[0.0], [1.0]], [[2.0], [3.0]]]), torch.tensor([[4.0], [5.0], [6.0]])
        >>> found = append((before,), torch.tensor([1, 2]), (new,), packed)
        >>> found.both[0].flatten().tolist(), found.cu_seqlens.tolist(), found.start.tolist()
        ([1.0, 4.0, 5.0, 2.0, 3.0, 6.0], [0, 3, 6], [0, 0])
        >>> found.after[0].flatten().tolist(), found.counts.tolist()
        ([4.0, 5.0, 3.0, 6.0], [3, 3])
    """
    found: AppendedRows = OP.run(_signature(remembered, count, rows, packed), remembered, count, rows, packed)
    return found


def _signature(remembered: tuple[Tensor, ...], count: Tensor, rows: tuple[Tensor, ...], packed: Packed) -> Signature:
    have = [tuple(each.shape) for each in remembered]
    capacity = have[0][1] if have and len(have[0]) > 1 else 0
    if not rows or have != [(packed.batch, capacity, *row.shape[1:]) for row in rows]:
        new = [tuple(row.shape) for row in rows]
        raise ShapeError(f"append: must remember (B, capacity, ...) for rows (K, ...) of {new}, got {have}")
    if count.shape != (packed.batch,) or any(row.shape[0] != packed.index.shape[0] for row in rows):
        raise ShapeError(
            f"append: needs {packed.batch} counts and {packed.index.shape[0]} rows of each kind, got "
            f"{tuple(count.shape)} and {[row.shape[0] for row in rows]}"
        )
    differentiated = torch.is_grad_enabled() and any(each.requires_grad for each in (*remembered, *rows))
    return Signature(rows[0].device, differentiated)


def _why_not_triton(signature: Signature) -> str | None:
    return "the kernel has no gradient" if signature.differentiated else why_not_triton(signature.device)


OP = Op("append", _signature)
OP.register(
    "triton",
    lazy("sma.ops.append.launch", "append"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.append)
OP.register("reference", reference.append, priority=90)
