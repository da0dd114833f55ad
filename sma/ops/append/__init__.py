"""append: put new tokens of every sequence behind the last ones that it remembers (paper, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import why_not_triton_on
from sma.ops.packed import Packed

OP = Op("append")


class AppendedRows(NamedTuple):
    """What is remembered together with new tokens.

    Attributes:
        both: per kind of row ``(K', ...)``, sequences one after the other, each with what it remembered in front.
        after: per kind of row ``(B, capacity, ...)``: the last rows of each sequence, zeros in front of fewer.
        cu_seqlens: ``(B + 1,)`` int64: sequence b owns ``both[cu_seqlens[b]:cu_seqlens[b + 1]]``. One entry more with a
            fixed number of new rows, as in :class:`~sma.ops.packed.Packed`.
        start: ``(B,)`` int64: how many rows of each stream came before its first one in ``both``. One entry more with a
            fixed number of new rows, 0.
        counts: ``(B,)`` int64: how many rows each stream has had in all.
    """

    both: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    cu_seqlens: Tensor
    start: Tensor
    counts: Tensor


def append(
    remembered: tuple[Tensor, ...], count: Int[Tensor, " batch"], rows: tuple[Tensor, ...], packed: Packed
) -> AppendedRows:
    """Put new rows behind remembered ones.

    Without a fixed number of new rows that of all rows is read back from the device, once. With one nothing is: there
    are ``B * capacity + K``, and those that nobody needs hold anything that was remembered, and belong to the sequence
    of the rows without a token, the last one.

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
    found: AppendedRows = OP(remembered, count, rows, packed)
    return found


def _why_not_triton(
    remembered: tuple[Tensor, ...], count: Tensor, rows: tuple[Tensor, ...], packed: Packed
) -> str | None:
    if torch.is_grad_enabled() and any(each.requires_grad for each in (*remembered, *rows)):
        return "the kernel has no gradient"
    return why_not_triton_on(rows[0], (rows[0].dtype,))  # moves numbers of any kind


@OP.backend("triton", priority=10, applies=_why_not_triton)
def _triton(remembered: tuple[Tensor, ...], count: Tensor, rows: tuple[Tensor, ...], packed: Packed) -> AppendedRows:
    from sma.ops.append.triton_kernel import append as run

    return run(remembered, count, rows, packed)


from sma.ops.append import eager, reference  # noqa: E402,F401  (registers the backends)
