"""Gumbel-softmax decisions: random while training, the most likely choice in evaluation (paper, ablation)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sma.configurators.common import at_least_float32
from sma.interfaces import Configurator


class GumbelSoftmax(Configurator):
    """``p = softmax((u + g) / temperature)`` with Gumbel noise g while training (Jang et al., arXiv 1611.01144).

    Active iff ``p[1] > p[0]``. The confidence is ``p[1]``, or with ``hard`` the straight-through one: 1, with the
    gradient of ``p[1]``.
    """

    logits_per_module = 2

    @dataclass(kw_only=True, frozen=True)
    class Config(Configurator.Config):
        temperature: float = 1.0
        hard: bool = False

        def __post_init__(self) -> None:
            self.require(self.temperature > 0, "temperature", "must be positive")

    def __init__(self, config: Config, *, n_modules: int = 1) -> None:
        super().__init__(config, n_modules=n_modules)
        self.temperature = config.temperature
        self.hard = config.hard

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        margin = logits[..., 1] - logits[..., 0] + self.balance.to(logits.dtype)
        if self.training:
            noise = torch.empty_like(logits).exponential_().log()  # minus a Gumbel variable
            margin = margin + noise[..., 0] - noise[..., 1]
        return torch.sigmoid(margin / self.temperature)

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return ~(score <= 0.5)  # NaN counts as active, so that it shows

    def weigh(self, score: Tensor, active: Tensor) -> Tensor:
        return 1 + score - score.detach() if self.hard else score
