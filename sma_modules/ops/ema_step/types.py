"""What happens in a step of :func:`~sma_modules.ops.ema_step.ema_step`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sma.ops.row_norm import RowNorm
from sma_modules.ops.ema.types import Activation


class Step(NamedTuple):
    """Which slots take a token, and what is computed beside the average.

    Attributes:
        live: ``(S,)`` slots that take a token.
        position: ``(S,)`` int64, tokens that each slot has taken before.
        norm: applied to the tokens first, or None.
        activation: of the output.
    """

    live: Tensor
    position: Tensor
    norm: RowNorm | None
    activation: Activation


class Signature(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    width: int
    normalised: bool
    empty: bool
