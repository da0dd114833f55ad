"""What :func:`~sma.ops.router.router` decides by, what it returns, and what the choice of its backend depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sma.ops.packed import Packed


class Gate(NamedTuple):
    """A decision by threshold, about each token and module alone.

    ``score = sigmoid(margin / (temperature * exp(log_temperature)))``, and a token is active unless ``score <=
    threshold``. The margin is a module's logit plus its balance; with two logits it is the second (active) less the
    first (inactive), of which the sigmoid is the softmax.

    Attributes:
        balance: ``(M,)`` added to the logits in favour of activation; it gets no gradient.
        log_temperature: ``(1,)``, or None for 0.
        temperature: positive.
        threshold: strictly between 0 and 1.
    """

    balance: Tensor
    log_temperature: Tensor | None = None
    temperature: float = 1.0
    threshold: float = 0.5

    def score(self, logits: Tensor) -> Tensor:
        """Scores ``(B, L, M)``, in the dtype of the logits ``(B, L, M, 1 or 2)``."""
        return self.margin_and_score(logits)[1]

    def margin_and_score(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both ``(B, L, M)``, in the dtype of the logits ``(B, L, M, 1 or 2)``."""
        margin = logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]
        margin = scaled = margin + self.balance.to(logits.dtype)
        if self.log_temperature is not None:
            scaled = scaled / self.log_temperature.to(scaled.dtype).exp()
        if self.temperature != 1:
            scaled = scaled / self.temperature
        return margin, torch.sigmoid(scaled)

    def decide(self, score: Tensor) -> Tensor:
        """Which tokens are active. NaN is, so that it shows in the output instead of hiding."""
        return ~(score <= self.threshold)


class Routed(NamedTuple):
    """What :func:`router` returns.

    Attributes:
        x: the tokens, passed through.
        score: ``(B, L, M)``, 0 at padding, in float32 (float64 for float64 inputs) also under autocast.
        active: ``(B, L, M)`` bool, False at padding.
        margin: ``(B, L, M)`` like the score, but without a gradient.
        valid: ``(B, L)`` bool: real tokens.
        column: ``(B, L)`` int64: the column of each token; None where ``valid`` was given.
        counts: ``(M, blocks)`` int32 of the active tokens, for :func:`~sma.ops.pack.pack`; None where not counted.
    """

    x: Tensor
    score: Tensor
    active: Tensor
    margin: Tensor
    valid: Tensor
    column: Tensor | None
    counts: Tensor | None


Compressor = Callable[[Packed], tuple[Tensor, Tensor, Tensor]]
"""From what was packed to its tokens ``(K, D)``, the tokens ``(B, L, D)`` passed through, and their scores."""


class Signature(NamedTuple):
    """Of the tokens, the weight and the gate; ``empty`` says that there is nothing to compute."""

    device: torch.device
    dtypes: tuple[torch.dtype | None, ...]
    logits: int
    empty: bool
