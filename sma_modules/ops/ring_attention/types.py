"""A working memory that is written in place, the last activated tokens of every sequence in a ring; and its query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sma.errors import StreamingError
from sma.steppers import SlotSpec
from sma.working_memory import WorkingMemory
from sma_modules.ops.window_attention.types import Inputs, Rule


@dataclass(frozen=True)
class Ring:
    """The last activated tokens of S sequences.

    Token number i of a sequence, counted from the beginning of its stream, lies in row ``i % R``. R is one more than
    the tokens that are visible, so that a new one overwrites none of them, and one more for each that can be taken
    back. How many tokens were activated is kept by position: row ``p % V`` of ``counts`` is the number after p tokens.

    Attributes:
        keys: ``(S, R, G, z)``.
        values: ``(S, R, G, h)``.
        positions: ``(S, R)`` int64, original positions.
        counts: ``(V, S)`` int64.
        reach: how many tokens besides the own one are visible at most, R - 1 - rollback.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: Tensor
    reach: int

    @classmethod
    def empty(cls, spec: SlotSpec, reach: int, heads: int, d_key: int, d_value: int) -> Ring:
        """An empty ring for the slots of ``spec``, keys ``(heads, d_key)`` and values ``(heads, d_value)``."""
        rows, like = reach + 1 + spec.rollback, spec.like
        return cls(
            torch.zeros(spec.slots, rows, heads, d_key, dtype=like.dtype, device=like.device),
            torch.zeros(spec.slots, rows, heads, d_value, dtype=like.dtype, device=like.device),
            torch.zeros(spec.slots, rows, dtype=torch.int64, device=like.device),
            # A version that is read and the next one are never the same: a kernel's programs may do either first.
            torch.zeros(spec.rollback + 2, spec.slots, dtype=torch.int64, device=like.device),
            reach,
        )

    @property
    def rows(self) -> int:
        """R."""
        return self.keys.shape[1]

    @property
    def versions(self) -> int:
        """V."""
        return self.counts.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        """All of the memory."""
        return self.keys, self.values, self.positions, self.counts

    def count(self, position: Tensor) -> Tensor:
        """``(S,)`` int64: tokens activated before ``position (S,)``."""
        return self.counts.gather(0, (position % self.versions)[None]).squeeze(0)

    def advance(self, live: Tensor, position: Tensor, number: Tensor) -> None:
        """In slots that are ``live (S,)``, ``number (S,)`` tokens are activated after the one at ``position (S,)``."""
        after = ((position + 1) % self.versions)[None]
        kept = self.counts.gather(0, after).squeeze(0)
        self.counts.scatter_(0, after, torch.where(live, number, kept)[None])

    def read(self, slots: Tensor, position: Tensor) -> WorkingMemory:
        """What ``slots (n,)`` remember after ``position (n,)`` tokens."""
        count = self.counts[position % self.versions, slots]
        number = count[:, None] - self.reach + torch.arange(self.reach, device=count.device)
        row, unused = number % self.rows, number < 0
        rows = tuple(
            each[slots[:, None], row].masked_fill(unused.view(*unused.shape, *(1,) * (each.dim() - 2)), 0)
            for each in (self.keys, self.values, self.positions)
        )
        return WorkingMemory(rows, count)

    def write(self, slots: Tensor, memory: object, position: Tensor) -> None:
        """Set ``slots (n,)``, which stand at ``position (n,)``, to the contents of ``memory``.

        Raises:
            StreamingError: ``memory`` is of another type or size.
        """
        ours = [(self.reach, *each.shape[2:]) for each in (self.keys, self.values, self.positions)]
        theirs = [tuple(row.shape[1:]) for row in memory.rows] if isinstance(memory, WorkingMemory) else None
        if not isinstance(memory, WorkingMemory) or ours != theirs:
            raise StreamingError(f"Ring: needs a WorkingMemory of rows {ours}, got {theirs or type(memory).__name__}")
        count = memory.count.to(slots.device)
        self.counts[:, slots] = count
        number = count[:, None] - self.reach + torch.arange(self.reach, device=count.device)
        for each, rows in zip((self.keys, self.values, self.positions), memory.rows, strict=True):
            each[slots[:, None], number % self.rows] = rows.to(each.device, each.dtype)


class Query(NamedTuple):
    """One token of every slot, see :func:`~sma_modules.ops.ring_attention.ring_attention`.

    Attributes:
        inputs: tensors of one row per slot.
        active: ``(S,)`` slots that attend.
        live: ``(S,)`` slots that take a token.
        position: ``(S,)`` tokens that each slot has taken before.
        at: ``(S,)`` original positions.
        rule: which tokens of the ring are visible.
    """

    inputs: Inputs
    active: Tensor
    live: Tensor
    position: Tensor
    at: Tensor
    rule: Rule


class Signature(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    key_width: int
    empty: bool
