"""Every module chooses its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sma.configurators.common import at_least_float32, top_of_sequence
from sma.interfaces import Configurator


class ExpertChoice(Configurator):
    """Each module takes the ``rate`` of a sequence's tokens with the highest affinity ``softmax(u)`` over the modules
    (arXiv 2202.09368).

    The choice is made within each sequence, so that a sequence never depends on its batch mates. It looks at the whole
    sequence: not causal. The confidence is the affinity. With a single module the affinity is ``sigmoid(u)``.
    """

    causal = False
    adjustable = False

    @dataclass(kw_only=True, frozen=True)
    class Config(Configurator.Config):
        rate: float = 0.25

        def __post_init__(self) -> None:
            self.require(0 < self.rate <= 1, "rate", "must lie in (0, 1]")

    def __init__(self, config: Config, *, n_modules: int = 1) -> None:
        super().__init__(config, n_modules=n_modules)
        self.rate = config.rate

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        logits = at_least_float32(logits[..., 0])
        return logits.softmax(-1) if self.n_modules > 1 else logits.sigmoid()

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return top_of_sequence(score, valid, self.rate)
