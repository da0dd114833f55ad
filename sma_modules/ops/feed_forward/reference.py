"""The definition: formulas of the activations, and one row after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sma_modules.ops.feed_forward import ACTIVATE, FEED_FORWARD

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@ACTIVATE.backend("reference", priority=90)
def activate(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """The formula."""
    act = FORMULAS[activation]
    return act(up) if gate is None else act(gate) * up


@FEED_FORWARD.backend("reference", priority=90)
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
    """Row by row."""

    def linear(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return weight @ row if bias is None else weight @ row + bias

    rows = []
    for row in x:
        b = None if gate is None else linear(row, gate, gate_bias)
        rows.append(linear(activate(linear(row, up, up_bias), b, activation), down, down_bias))
    if rows:
        return torch.stack(rows)
    used = [each for each in (up, up_bias, gate, gate_bias, down, down_bias) if each is not None]
    return x @ up.t() @ down.t() + sum(0 * each.sum() for each in used)
