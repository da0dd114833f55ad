"""The tokens of one call of a model, with their padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TokenBatch(NamedTuple):
    """Tokens of a batch: ``ids (B, L)`` and ``valid (B, L)``, None when all are real tokens."""

    ids: Tensor
    valid: Tensor | None

    @property
    def length(self) -> int:
        """L."""
        return self.ids.shape[1]

    def map(self, fn: Callable[[Tensor], Tensor]) -> TokenBatch:
        """``fn`` applied to both."""
        return TokenBatch(fn(self.ids), None if self.valid is None else fn(self.valid))

    def first(self, count: int) -> TokenBatch | None:
        """The first ``count`` columns, None for none."""
        return self.map(lambda columns: columns[:, :count]) if count else None

    def split(self, size: int) -> list[TokenBatch]:
        """Parts of ``size`` columns, the last one shorter; one at least."""
        ids = self.ids.split(size, 1)  # type: ignore[no-untyped-call]
        if self.valid is None:
            return [TokenBatch(each, None) for each in ids]
        return list(map(TokenBatch, ids, self.valid.split(size, 1)))  # type: ignore[no-untyped-call]

    def then(self, more: TokenBatch) -> TokenBatch:
        """Both, the columns of ``more`` behind these."""
        ids = torch.cat([self.ids, more.ids], 1)
        if self.valid is None and more.valid is None:
            return TokenBatch(ids, None)
        masks = [
            torch.ones_like(each.ids, dtype=torch.bool) if each.valid is None else each.valid for each in (self, more)
        ]
        return TokenBatch(ids, torch.cat(masks, 1))
