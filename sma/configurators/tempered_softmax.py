"""The paper's configurator: a softmax over {inactive, active} with one learned temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sma.configurators.common import at_least_float32
from sma.interfaces import Configurator
from sma.ops.router import Gate


class TemperedSoftmax(Configurator):
    """``p = softmax(u / exp(temp))``; active iff ``p[1] > p[0]``; the confidence is ``p[1]`` (paper, section 3.2).

    ``temp`` is one learned scalar per layer, ``log(init_temp * sqrt(d_model))`` at the start.
    """

    logits_per_module = 2

    @dataclass(kw_only=True, frozen=True)
    class Config(Configurator.Config):
        init_temp: float = 0.3

        def __post_init__(self) -> None:
            self.require(self.init_temp > 0, "init_temp", "must be positive")

    def __init__(self, config: Config, *, n_modules: int = 1) -> None:
        super().__init__(config, n_modules=n_modules)
        self.init_temp = config.init_temp
        self.temp = nn.Parameter(torch.zeros(1))

    def reset(self, d_model: int) -> None:
        nn.init.constant_(self.temp, math.log(self.init_temp * math.sqrt(d_model)))

    def gate(self) -> Gate | None:
        return Gate(self.balance, self.temp)

    def _gate(self) -> Gate:
        return Gate(self.balance, self.temp)

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        return self._gate().score(at_least_float32(logits))

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return self._gate().decide(score)
