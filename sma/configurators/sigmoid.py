"""A configurator with one logit per module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sma.configurators.common import at_least_float32
from sma.interfaces import Configurator
from sma.ops.router import Gate


class Sigmoid(Configurator):
    """``p = sigmoid(u / temperature)``; active iff ``p > threshold``; the confidence is ``p`` (the paper's sigmoid
    variant).
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(Configurator.Config):
        temperature: float = 1.0
        threshold: float = 0.5

        def __post_init__(self) -> None:
            self.require(self.temperature > 0, "temperature", "must be positive")
            self.require(0 < self.threshold < 1, "threshold", "must lie strictly between 0 and 1")

    def __init__(self, config: Config, *, n_modules: int = 1) -> None:
        super().__init__(config, n_modules=n_modules)
        self.temperature = config.temperature
        self.threshold = config.threshold

    def gate(self) -> Gate | None:
        return Gate(self.balance, None, self.temperature, self.threshold)

    def _gate(self) -> Gate:
        return Gate(self.balance, None, self.temperature, self.threshold)

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        return self._gate().score(at_least_float32(logits))

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return self._gate().decide(score)
