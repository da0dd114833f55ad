"""What the choice of a backend of :func:`~sma.ops.segment_sum.segment_sum` depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Signature(NamedTuple):
    """Of the rows."""

    device: torch.device
    dtype: torch.dtype
