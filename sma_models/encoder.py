"""The parts that all models of whole sequences share: embedding, stack, pooling and the classifier's two layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma.dropout import Dropout
from sma.errors import ShapeError
from sma.interfaces import Model
from sma.routing import Routing
from sma_models.embeddings import SinusoidalPositions, TokenEmbedding, ValueEmbedding, embedded, like_of
from sma_models.model_io import check_tokens, without_padding
from sma_models.stack import HiddenStates, Stack, StackConfig


@dataclass(kw_only=True, frozen=True)
class EncoderConfig(StackConfig):
    """The options that all models of whole sequences share.

    Attributes:
        vocab_size: number of tokens, or None when the input is real numbers.
        n_classes: number of classes.
        d_hidden: width of the classifier's hidden layer; None means 2 * d_model.
        positions: ``sinusoidal`` adds absolute positions to the embedding.
        pool: ``mean`` over the real tokens, or the ``first`` token.
        head_activation: of the hidden layer.
    """

    n_classes: int
    vocab_size: int | None = None
    d_hidden: int | None = None
    positions: Literal["none", "sinusoidal"] = "none"
    pool: Literal["mean", "first"] = "mean"
    head_dropout: float = 0.0
    causal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.n_classes >= 2, "n_classes", "must be at least 2")
        self.require(
            self.vocab_size is None or self.vocab_size >= 2,
            "vocab_size",
            "must be at least 2, or null for real numbers",
        )
        self.require(
            self.positions != "sinusoidal" or self.d_model % 2 == 0, "d_model", "must be even for sinusoidal positions"
        )
        self.require(0 <= self.head_dropout < 1, "head_dropout", "must lie in [0, 1)")


class Encoder(Model):
    """Embedding, stack and pooling, and the classifier's two layers over ``n_inputs`` pooled vectors."""

    def __init__(self, config: EncoderConfig, n_inputs: int) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.pool = config.pool
        if config.vocab_size is None:
            self.embedding: nn.Module = ValueEmbedding(config.d_model)
        else:
            self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
            nn.init.normal_(self.embedding.weight, 0.0, config.d_model**-0.5)
        self.positions = SinusoidalPositions(config.d_model) if config.positions == "sinusoidal" else None
        self.stack = Stack(config, causal=config.causal)
        d_hidden = config.d_hidden or 2 * config.d_model
        self.hidden = nn.Linear(n_inputs * config.d_model, d_hidden)
        self.head_dropout = Dropout(config.head_dropout)
        self.head = nn.Linear(d_hidden, config.n_classes, bias=False)
        nn.init.xavier_uniform_(self.hidden.weight)
        nn.init.zeros_(self.hidden.bias)
        nn.init.xavier_uniform_(self.head.weight)

    def _encode(
        self,
        inputs: Tensor,
        valid: Tensor | None,
        lengths: Tensor | None,
        replay: Mapping[str, Routing] | None,
        hidden: HiddenStates | None = None,
    ) -> tuple[Tensor, dict[str, Routing], dict[str, Tensor]]:
        """Pooled features ``(B, D)``, routings and losses."""
        inputs = without_padding(type(self).__name__, inputs, valid, like_of(self.embedding), lengths)
        self._check(inputs)
        if self.vocab_size is None:
            x = self.embedding(inputs)
        else:
            x = embedded(self.embedding, inputs, rounded=self.positions is None)  # once, behind the sum
        if self.positions is not None:
            column = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape)
            position = column if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
            x = x + self.positions(position).to(x)
        out = self.stack(x, valid=valid, lengths=lengths, replay=replay, hidden=hidden)
        features = out.x.to(inputs.device)  # the stack may lie elsewhere
        if self.pool == "mean":
            count = valid.sum(1) if valid is not None else lengths
            pooled = features.mean(1) if count is None else features.sum(1) / count.clamp(min=1)[:, None]
        elif valid is None:
            pooled = features[:, 0]
        else:
            pooled = features[torch.arange(features.shape[0], device=features.device), valid.int().argmax(1)]
        return pooled, dict(out.routings), dict(out.losses)

    def _check(self, inputs: Tensor) -> None:
        kind = type(self).__name__
        if self.vocab_size is not None:
            check_tokens(kind, inputs, self.vocab_size)
        elif inputs.dim() != 2 or not inputs.is_floating_point() or inputs.shape[0] == 0:
            raise ShapeError(
                f"{kind}: values must be floats of shape (B, L), B > 0, got {inputs.dtype} {tuple(inputs.shape)}"
            )
        elif inputs.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(inputs.isfinite().all()):
            raise ShapeError(f"{kind}: values must be finite, got NaN or Inf")
        if inputs.shape[1] == 0:
            raise ShapeError(f"{kind}: sequences must hold at least one token, got {tuple(inputs.shape)}")

    def _classify(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.head(F.gelu(self.head_dropout(self.hidden(pooled))))
        return logits
