"""The feed-forward network with the operations of PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sma.runtime.onednn import linear
from sma_modules.ops.feed_forward.types import Network

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """One operation for each step."""
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up


def feed_forward(x: Tensor, network: Network) -> Tensor:
    """One operation for each step."""
    up, gate, down, activation = network
    hidden = linear(x, *up)
    act = ACTIVATIONS[activation]
    hidden = act(hidden) if gate is None else act(linear(x, *gate)) * hidden
    return linear(hidden, *down)
