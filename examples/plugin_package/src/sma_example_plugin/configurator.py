"""A configurator that always keeps the beginning of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sma


class SinkSigmoid(sma.Configurator):
    """``p = sigmoid(u)``; active iff ``p > threshold`` or the token is one of the first ``n_sinks`` of its sequence.

    The first tokens of a sequence serve attention as a resting place ("attention sinks", arXiv 2309.17453), and they
    are where a module has seen nothing yet. The decision needs the token's own logit and position only, so it is causal
    and the same in chunks. The confidence is ``p`` for every active token, so the router learns from the sinks too.
    """

    logits_per_module = 1

    @dataclass(kw_only=True, frozen=True)
    class Config(sma.Configurator.Config):
        """Options.

        Attributes:
            n_sinks: how many tokens at the start of each sequence are always active.
            threshold: of the probability, for all others.
        """

        n_sinks: int = 4
        threshold: float = 0.5

        def __post_init__(self) -> None:
            self.require(self.n_sinks >= 0, "n_sinks", "must be at least 0")
            self.require(0 < self.threshold < 1, "threshold", "must lie strictly between 0 and 1")

    def __init__(self, config: Config, *, n_modules: int = 1) -> None:
        super().__init__(config, n_modules=n_modules)
        self.n_sinks = config.n_sinks
        self.threshold = config.threshold

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        """``(B, L, M)`` probabilities, in float32 at least: a decision is never taken in half precision."""
        logits = logits[..., 0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.sigmoid(logits + self.balance.to(logits.dtype))

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        """``(B, L, M)`` bool."""
        return ~(score <= self.threshold) | (position < self.n_sinks)[..., None]  # NaN counts as active, to be seen
