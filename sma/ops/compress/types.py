"""What the choice of a backend of :func:`~sma.ops.compress.compress` depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Signature(NamedTuple):
    """Of the tokens; ``fixed`` says that the number of rows is a capacity."""

    device: torch.device
    dtype: torch.dtype
    fixed: bool
