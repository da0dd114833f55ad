"""Small plugins that the tests of the core use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sma.interfaces import Module, ModuleOutput
from sma.routing import Packed
from sma.state import State


class Losing(Module):
    """A linear map that also returns a loss."""

    def __init__(self, width: int) -> None:
        super().__init__(Module.Config(), d_model=width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> ModuleOutput:
        y = self.linear(x)
        return ModuleOutput(y, None, {"size": y.square().sum()})


@dataclass(frozen=True)
class RunningState(State):
    """The sum so far, ``(B, D)``."""

    total: Tensor


class Running(Module):
    """The running sum over the activated tokens when causal, else the sum of all of them; times a learned scale."""

    layout = "packed"

    @dataclass(kw_only=True, frozen=True)
    class Config(Module.Config):
        bounded: bool = True

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.streams = config.bounded
        self.scale = nn.Parameter(torch.ones(d_model))

    def initial_state(self, batch: int, like: Tensor) -> RunningState:
        return RunningState(like.new_zeros(batch, self.d_model))

    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        before = x.new_zeros(packed.batch, self.d_model) if state is None else state.total
        same = packed.sequence[:, None] == packed.sequence
        seen = same.tril() if self.causal else same
        y = before[packed.sequence] + seen.to(x.dtype) @ x
        after = before.index_add(0, packed.sequence, x)
        return ModuleOutput(y * self.scale, None if state is None else RunningState(after))
