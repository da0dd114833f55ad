"""The feed-forward network in PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sma.runtime.onednn import linear
from sma_modules.ops.feed_forward import ACTIVATE, FEED_FORWARD

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@ACTIVATE.backend("eager")
def activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """One operation for each step."""
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up


@FEED_FORWARD.backend("eager")
def feed_forward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """One operation for each step."""
    b = None if gate is None else linear(x, gate, gate_bias)
    return linear(activate(linear(x, up, up_bias), b, activation), down, down_bias)
