"""What :func:`~sma_modules.ops.feed_forward.feed_forward` multiplies with and how it activates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["relu", "gelu", "silu"]


class Projection(NamedTuple):
    """``weight (d_out, d_in)`` and ``bias (d_out,)`` or None."""

    weight: Tensor
    bias: Tensor | None = None


class Network(NamedTuple):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))``."""

    up: Projection
    gate: Projection | None
    down: Projection
    activation: Activation


class ActivateSignature(NamedTuple):
    """What the choice of a backend for the activation depends on."""

    device: torch.device
    dtype: torch.dtype
    small: bool


class NetworkSignature(NamedTuple):
    """What the choice of a backend for the network depends on; ``autocast`` is its dtype, None where it is off."""

    device: torch.device
    dtype: torch.dtype
    weights: tuple[torch.dtype, ...]
    autocast: torch.dtype | None
    small: bool
