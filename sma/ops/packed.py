"""The packed view of the active tokens, which every operation works on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sma.ops.pack import PackedRows, pack


@dataclass(frozen=True)
class Packed:
    """The active tokens of one module, all sequences one after the other ("varlen", as in flash-attention).

    With a fixed capacity that is the number of rows K. Rows without a token follow the others and make up one more
    sequence: ``cu_seqlens`` has ``B + 2`` entries. A sequence module therefore needs no special case for them.

    Attributes:
        index: ``(K,)`` int64, ascending: where each token lies in the flattened ``(B * L)`` input; ``B * L`` in rows
            without a token.
        cu_seqlens: ``(B + 1,)`` int64: sequence b owns the packed rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        position: ``(K,)`` int64: 0-based position of each token among the real tokens of its own sequence, counted from
            the start of the stream (padding does not count, chunks continue).
        max_length: host-side upper bound of the longest sequence of active tokens.
        shape: ``(B, L)`` of the input that was compressed.
        row: ``(B * L,)`` int32: the inverse of ``index``, -1 for tokens that are not active.
        overflow: ``()`` int64: active tokens that were dropped for lack of capacity; None without a capacity.
        whole: known on the host: the rows are all ``B * L`` tokens of the input, in their order.
    """

    index: Tensor
    cu_seqlens: Tensor
    position: Tensor
    max_length: int
    shape: tuple[int, int]
    row: Tensor
    overflow: Tensor | None = None
    whole: bool = False

    @property
    def batch(self) -> int:
        """Number of sequences B."""
        return self.shape[0]

    @property
    def fixed(self) -> bool:
        """True when the number of rows is a capacity, not that of the active tokens."""
        return self.overflow is not None

    @cached_property
    def lengths(self) -> Tensor:
        """``(B,)`` number of active tokens of each sequence (``(B + 1,)`` with a capacity)."""
        return self.cu_seqlens.diff()

    @cached_property
    def sequence(self) -> Tensor:
        """``(K,)`` int64: which sequence each packed row belongs to."""
        return self.index // max(self.shape[1], 1)

    @cached_property
    def rank(self) -> Tensor:
        """``(K,)`` int64: 0-based position of each token among the active tokens of its sequence in this chunk."""
        return torch.arange(self.index.numel(), device=self.index.device) - self.cu_seqlens[self.sequence]

    @property
    def real(self) -> Tensor | None:
        """``(K,)`` bool: rows that hold a token; None when all do."""
        return self.index < self.shape[0] * self.shape[1] if self.fixed else None

    @staticmethod
    def from_mask(mask: Tensor, position: Tensor | None = None, *, capacity: int | None = None) -> Packed:
        """Pack the True entries of ``mask (B, L)``.

        Args:
            mask: which tokens to keep.
            position: ``(B, L)`` original positions; by default the column.
            capacity: fixed number of rows: so many active tokens of the batch, the first ones, get a row each.
        """
        return Packed.from_rows(pack(mask, position, capacity=capacity), (mask.shape[0], mask.shape[1]))

    @staticmethod
    def of_all(position: Tensor) -> Packed:
        """All tokens of an input without padding, whose original positions are ``position (B, L)``.

        No value is read, so this does not synchronise with the device.
        """
        (batch, length), device = position.shape, position.device
        index = torch.arange(batch * length, device=device)
        cu_seqlens = torch.arange(batch + 1, device=device) * length
        row = index.to(torch.int32)
        return Packed(index, cu_seqlens, position.flatten(), length, (batch, length), row, whole=True)

    @staticmethod
    def from_rows(rows: PackedRows, shape: tuple[int, int]) -> Packed:
        """The view of what :func:`sma.ops.pack.pack` made of a mask of ``(B, L) = shape``."""
        (batch, length), count = shape, rows.tokens.numel()
        fixed = rows.overflow is not None
        if not fixed and rows.tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            count = int(rows.cu_seqlens.diff().max()) if batch else 0
        # Elsewhere reading the longest sequence would synchronise with the device, and a bound is enough.
        max_length = count if fixed else min(count, length)
        return Packed(rows.tokens, rows.cu_seqlens, rows.position, max_length, shape, rows.row, rows.overflow)
