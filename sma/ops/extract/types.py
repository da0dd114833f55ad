"""What the choice of a backend of :func:`~sma.ops.extract.extract` depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Signature(NamedTuple):
    """Of the rows; ``fixed`` says that their number is a capacity."""

    device: torch.device
    dtype: torch.dtype
    fixed: bool
