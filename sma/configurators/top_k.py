"""The k best modules of each token, or the best tokens of each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sma.configurators.common import at_least_float32, top_of_sequence
from sma.errors import ConfigError
from sma.interfaces import Configurator


class TopK(Configurator):
    """Top-k, over the modules (a mixture of experts, arXiv 1701.06538) or over the sequence (a mixture of depths, arXiv
    2404.02258).

    ``over: modules`` gives every token its ``k`` modules of highest probability ``softmax(u)``; the confidence is that
    probability, divided by the sum over the chosen modules when ``renormalise`` is set. ``over: sequence`` gives every
    module the ``rate`` of the sequence's tokens with the highest ``sigmoid(u)``; that looks at the whole sequence and
    is refused in a causal model.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(Configurator.Config):
        over: Literal["modules", "sequence"] = "modules"
        k: int = 1
        renormalise: bool = True
        rate: float = 0.25

        def __post_init__(self) -> None:
            self.require(self.over in ("modules", "sequence"), "over", "must be 'modules' or 'sequence'")
            self.require(self.k >= 1, "k", "must be at least 1")
            self.require(0 < self.rate <= 1, "rate", "must lie in (0, 1]")

    def __init__(self, config: Config, *, n_modules: int = 1) -> None:
        super().__init__(config, n_modules=n_modules)
        if config.over == "modules" and config.k > n_modules:
            raise ConfigError(f"k: must be at most the number of modules, {n_modules}, got {config.k}")
        self.over = config.over
        self.k = config.k
        self.renormalise = config.renormalise
        self.rate = config.rate
        self.causal = self.adjustable = config.over == "modules"

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        logits = at_least_float32(logits[..., 0])
        return logits.softmax(-1) if self.over == "modules" else torch.sigmoid(logits)

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        if self.over == "sequence":
            return top_of_sequence(score, valid, self.rate)
        # The balance moves the choice only, never the confidence (auxiliary-loss-free balancing, arXiv 2408.15664).
        score = score.detach() + self.balance.to(score.dtype)
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)

    def weigh(self, score: Tensor, active: Tensor) -> Tensor:
        if self.over == "sequence" or not self.renormalise:
            return score
        chosen = (score * active).sum(-1, keepdim=True)
        return score / chosen.clamp(min=torch.finfo(score.dtype).tiny)
