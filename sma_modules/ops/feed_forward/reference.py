"""The definition: formulas of the activations, and one row after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sma_modules.ops.feed_forward.types import Network, Projection

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """The formula."""
    act = FORMULAS[activation]
    return act(up) if gate is None else act(gate) * up


def feed_forward(x: Tensor, network: Network) -> Tensor:
    """Row by row."""
    up, gate, down, activation = network

    def linear(row: Tensor, projection: Projection) -> Tensor:
        product = projection.weight @ row
        return product if projection.bias is None else product + projection.bias

    rows = []
    for row in x:
        b = None if gate is None else linear(row, gate)
        rows.append(linear(activate(linear(row, up), b, activation), down))
    if rows:
        return torch.stack(rows)
    used: list[Tensor] = [each for each in (*up, *(gate or ()), *down) if each is not None]
    return x @ up.weight.t() @ down.weight.t() + sum(0 * each.sum() for each in used)
