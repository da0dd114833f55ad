"""Working memory: a first-in-first-out history of the tokens that activated a module (arXiv 2306.11197, section 4).

It remembers the last ``capacity`` activated tokens of every sequence, however far apart they are in the input.
Attention over it is local attention over the compressed sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from sma.errors import StreamingError
from sma.ops.append import append
from sma.routing import Packed
from sma.state import State


class Appended(NamedTuple):
    """What a memory holds together with a chunk of new tokens.

    Attributes:
        rows: per kind of row ``(K', ...)``, sequences one after the other, each with what it remembered in front.
        cu_seqlens: ``(B + 1,)`` int64: sequence b owns ``cu_seqlens[b]:cu_seqlens[b + 1]``. One entry more with a
            fixed capacity, as in :class:`~sma.ops.packed.Packed`.
        start: ``(B,)`` int64: how many activated tokens of the stream came before the first row of each sequence. One
            entry more with a fixed capacity.
        memory: the memory after the chunk.
    """

    rows: tuple[Tensor, ...]
    cu_seqlens: Tensor
    start: Tensor
    memory: WorkingMemory


@dataclass(frozen=True)
class WorkingMemory(State):
    """The last tokens of every sequence; never changed in place.

    Attributes:
        rows: per kind of row (keys, values, positions, ...) ``(B, capacity, ...)``. The newest token stands last;
            slots not yet used are zero and stand first.
        count: ``(B,)`` int64: how many tokens each sequence has put in since the start of its stream.

    Example:
        >>> memory = WorkingMemory.empty(1, 2, torch.zeros(0, 1))
        >>> packed = Packed.from_mask(torch.tensor([[True, False, True, True]]))
        >>> memory.append(packed, torch.tensor([[1.0], [2.0], [3.0]])).memory.rows[0].flatten().tolist()
        [2.0, 3.0]
    """

    rows: tuple[Tensor, ...]
    count: Tensor

    @property
    def capacity(self) -> int:
        """How many tokens of a sequence are remembered at most."""
        return self.rows[0].shape[1]

    @property
    def lengths(self) -> Tensor:
        """``(B,)`` int64: how many tokens of each sequence are remembered."""
        return self.count.clamp(max=self.capacity)

    @classmethod
    def empty(cls, batch: int, capacity: int, *like: Tensor) -> Self:
        """A memory of nothing, for rows with the trailing shape, dtype and device of ``like (K, ...)``."""
        rows = tuple(row.new_zeros(batch, capacity, *row.shape[1:]) for row in like)
        return cls(rows, torch.zeros(batch, dtype=torch.int64, device=like[0].device))

    def append(self, packed: Packed, *rows: Tensor) -> Appended:
        """Put new tokens behind the remembered ones.

        Args:
            packed: the new tokens; a sequence without any keeps its memory.
            *rows: ``(K, ...)`` one tensor per kind of row, in the order of :attr:`rows`.

        With a fixed capacity there are ``B * capacity + K`` rows, whatever is remembered, and no value is read: unused
        rows belong to the sequence of the rows without a token, the last one.

        Raises:
            StreamingError: the memory is of another batch size, or of rows of another number or shape.
        """
        self._check(packed, rows)
        found = append(self.rows, self.count, rows, packed)
        return Appended(found.both, found.cu_seqlens, found.start, type(self)(found.after, found.counts))

    def _check(self, packed: Packed, rows: tuple[Tensor, ...]) -> None:
        if packed.batch != self.count.shape[0]:
            raise StreamingError(
                f"WorkingMemory: holds {self.count.shape[0]} sequences, the batch of new tokens has {packed.batch}"
            )
        ours, theirs = [tuple(row.shape[2:]) for row in self.rows], [tuple(row.shape[1:]) for row in rows]
        if ours != theirs:
            raise StreamingError(f"WorkingMemory: remembers rows of shapes {ours}, the new tokens have {theirs}")
