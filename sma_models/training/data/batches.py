"""What a batch holds.

Every data set knows its own ``collate``. The batches are plain dictionaries:

* ``tokens``: ``tokens (B, L)`` int64, ``valid (B, L)`` bool or None when nothing is padded, ``lengths (B,)`` int64 or
  None likewise, ``label (B,)`` int64;
* ``values``: the same with ``values (B, L)`` float32 in place of ``tokens``;
* ``pairs``: ``tokens (B, 2, L)``, ``valid (B, 2, L)`` and ``lengths (B, 2)`` or None, ``label (B,)``: two documents
  each;
* ``lm``: ``tokens (B, L)``, ``targets (B, L)`` int64, -100 where there is nothing to predict (see :mod:`.language`),
  ``valid`` and ``lengths``.

Padding is always on the right, so ``lengths`` says all that ``valid`` does. A model that is given lengths does not
search for the padding, which would synchronise with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

Item = dict[str, Any]
"""One sample."""
Batch = dict[str, Tensor | None]
Kind = Literal["tokens", "values", "pairs", "lm"]


class Collating(Protocol):
    """A data set that makes its own batches."""

    def __getitem__(self, index: int) -> Item: ...

    @property
    def collate(self) -> Callable[[Sequence[Item]], Batch]: ...
