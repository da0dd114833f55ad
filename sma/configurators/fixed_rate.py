"""A fixed share of the tokens, evenly spread: for timing and ablation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sma.configurators.common import at_least_float32
from sma.interfaces import Configurator


class FixedRate(Configurator):
    """Position t is active iff ``floor((t + 1) * rate) > floor(t * rate)``; the confidence is 1.

    Depends on nothing that is learned.
    """

    logits_per_module = 0
    adjustable = False

    @dataclass(kw_only=True, frozen=True)
    class Config(Configurator.Config):
        rate: float

        def __post_init__(self) -> None:
            self.require(0 <= self.rate <= 1, "rate", "must lie in [0, 1]")

    def __init__(self, config: Config, *, n_modules: int = 1) -> None:
        super().__init__(config, n_modules=n_modules)
        self.rate = config.rate

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        return at_least_float32(logits).new_ones(*position.shape, self.n_modules)

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        start = position.to(torch.float64)
        chosen = ((start + 1) * self.rate).floor() > (start * self.rate).floor()
        return (chosen & valid)[..., None].expand_as(score)
