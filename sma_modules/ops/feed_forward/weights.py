"""What a linear map is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Linear(NamedTuple):
    """``weight (d_out, d_in)`` and ``bias (d_out,)`` or None."""

    weight: Tensor
    bias: Tensor | None = None
