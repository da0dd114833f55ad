"""What the choice of a backend of :func:`~sma.ops.embedding.embedding` depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Signature(NamedTuple):
    """Of the table and the result; ``empty`` says that there is nothing to look up."""

    device: torch.device
    weight_dtype: torch.dtype
    dtype: torch.dtype
    rows: int
    empty: bool
