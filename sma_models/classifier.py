"""Sequence classification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sma.routing import Routing
from sma_models.encoder import Encoder, EncoderConfig
from sma_models.model_io import ModelOutput
from sma_models.stack import HiddenStates


class Classifier(Encoder):
    """Sequence classification: the mean over the real tokens, one hidden layer with GELU, and a linear layer without
    bias.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(EncoderConfig):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config, n_inputs=1)

    def forward(
        self,
        inputs: Tensor,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
        hidden: HiddenStates | None = None,
    ) -> ModelOutput:
        """Logits ``(B, n_classes)``.

        Args:
            inputs: ``(B, L)`` token numbers, or real numbers when ``vocab_size`` is None.
            valid: ``(B, L)`` bool, True on real tokens; padding may hold anything. A row of padding is
                pooled to zeros.
            lengths: ``(B,)`` int64, instead of ``valid`` where all padding is on the right; spares the search for it.
            replay: routings whose decisions are taken over, by name.
            hidden: is filled with the features between the blocks.

        Raises:
            ShapeError: inputs of the wrong shape, dtype or range, or not finite; ``valid`` or ``lengths`` that do not
                fit them.
        """
        pooled, routings, losses = self._encode(inputs, valid, lengths, replay, hidden)
        return ModelOutput(self._classify(pooled), None, routings, losses)
