"""Every real token is active."""

from __future__ import annotations

from torch import Tensor

from sma.configurators.common import at_least_float32
from sma.interfaces import Configurator


class Always(Configurator):
    """All real tokens are active with confidence 1, so that the layer equals the plain module (SeqBoat-full)."""

    logits_per_module = 0
    adjustable = False
    everywhere = True

    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        return at_least_float32(logits).new_ones(*position.shape, self.n_modules)

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return valid[..., None].expand_as(score)
