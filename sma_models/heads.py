"""Whole models: a stack of blocks between an embedding and a head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma.dropout import Dropout
from sma.errors import RoutingError, ShapeError
from sma.interfaces import Model
from sma.linear import Linear, linear
from sma.ops.embedding import embedding
from sma.padding import check_lengths, check_valid, valid_of
from sma.routing import Routing
from sma_models.stack import Stack, StackConfig, StackState


@dataclass(frozen=True)
class ModelOutput:
    """What every model returns.

    Attributes:
        logits: ``(B, L, vocab_size)`` of a language model, ``(B, n_classes)`` of a classifier.
        state: streaming state, None unless one was passed in.
        routings: who was active, by the name of the layer.
        losses: auxiliary losses by name, scalars, already weighted; add them to the loss.
    """

    logits: Tensor
    state: StackState | None = None
    routings: Mapping[str, Routing] = field(default_factory=dict)
    losses: Mapping[str, Tensor] = field(default_factory=dict)


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def without_padding(
    name: str, inputs: Tensor, valid: Tensor | None, weight: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """The input ``(B, L)`` with zeros at padding, which may hold anything.

    Raises:
        ShapeError: it is no such tensor, ``valid`` or ``lengths`` do not fit it, or one is not on the device of
            ``weight``.
    """
    if not isinstance(inputs, Tensor):
        raise ShapeError(f"{name}: the input must be a tensor (B, L), got {type(inputs).__name__}")
    if inputs.device != weight.device:
        raise ShapeError(f"{name}: the input must be on the device of the model, {weight.device}, got {inputs.device}")
    if inputs.dim() != 2 or (valid is None and lengths is None):
        return inputs
    shape = (inputs.shape[0], inputs.shape[1])
    check_valid(valid, shape, inputs.device)
    check_lengths(lengths, valid, shape, inputs.device)
    return inputs.masked_fill(~(valid_of(lengths, inputs) if valid is None else valid), 0)


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Refuse what is not a batch of token numbers.

    Raises:
        ShapeError: wrong shape or dtype, an empty batch, or (checked on the CPU) a number outside the vocabulary.
    """
    if tokens.dim() != 2 or tokens.dtype not in INTEGERS:
        raise ShapeError(f"{name}: tokens must be integers of shape (B, L), got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.shape[0] == 0:
        raise ShapeError(f"{name}: the batch must hold at least one sequence, got {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise ShapeError(f"{name}: tokens must lie in 0..{vocab_size - 1}, got {low if low < 0 else high}")


class TokenEmbedding(nn.Embedding):
    """``nn.Embedding`` by :func:`sma.ops.embedding.embedding`."""

    def forward(self, input: Tensor, scale: float = 1.0, rounded: bool = True) -> Tensor:
        """``(B, L)`` to ``(B, L, D)``, times ``scale``; unless ``rounded`` is False, in the dtype of autocast."""
        device = input.device.type
        narrow = rounded and torch.is_autocast_enabled(device)
        return embedding(input, self.weight, scale=scale, dtype=torch.get_autocast_dtype(device) if narrow else None)


class ValueEmbedding(nn.Module):
    """``x_t * w + b`` for a real number ``x_t``: pixels, samples of sound. ``w`` ~ N(0, 1), ``b`` ~ N(0, 0.1)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_model))
        self.bias = nn.Parameter(torch.randn(d_model) * 0.1)

    def forward(self, values: Tensor) -> Tensor:
        """``(B, L)`` to ``(B, L, D)``."""
        return values.to(self.weight.dtype).unsqueeze(-1) * self.weight + self.bias


def _embedded(table: nn.Module, tokens: Tensor, scale: float = 1.0, rounded: bool = True) -> Tensor:
    """Tokens by our table, or by one that somebody put in its place."""
    if isinstance(table, TokenEmbedding):
        return table(tokens, scale, rounded)  # type: ignore[no-any-return]
    return table(tokens.long()) * scale  # type: ignore[no-any-return]


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the position, theta 10000, times a learned scale that starts at ``d_model ** -0.5``."""

    frequency: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), d_model**-0.5))
        self.register_buffer("frequency", 10000.0 ** (-torch.arange(0, d_model, 2).float() / d_model), persistent=False)

    def forward(self, position: Tensor) -> Tensor:
        """``(B, L)`` positions to ``(B, L, D)``."""
        angle = position.unsqueeze(-1) * self.frequency
        return torch.cat([angle.sin(), angle.cos()], -1)[..., : 2 * self.frequency.numel()] * self.scale


class LanguageModel(Model):
    """Causal language model over token numbers.

    The embedding ~ N(0, D^-0.5) is multiplied by ``sqrt(D)`` and, with ``tie_embeddings``, also turns features into
    logits.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(StackConfig):
        vocab_size: int
        tie_embeddings: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.vocab_size >= 2, "vocab_size", "must be at least 2")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, 0.0, config.d_model**-0.5)
        self.stack = Stack(config, causal=True)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, 0.0, config.d_model**-0.5)

    def initial_state(self, batch: int) -> StackState:
        """The state before the first token of ``batch`` sequences.

        Raises:
            StreamingError: a part of the model cannot stream; the message says why.
        """
        return self.stack.initial_state(batch, self.embedding.weight)

    def forward(
        self,
        tokens: Tensor,
        state: StackState | None = None,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> ModelOutput:
        """Logits of the next token at every position.

        Args:
            tokens: ``(B, L)`` integers; any L, also 1 or 0.
            state: from :meth:`initial_state` or the previous chunk; None runs whole sequences.
            valid: ``(B, L)`` bool, True on real tokens; padding may lie anywhere and hold anything.
            lengths: ``(B,)`` int64, instead of ``valid`` where all padding is on the right; spares the search for it.
            replay: routings whose decisions are taken over, by name.

        Raises:
            ShapeError: tokens, ``valid`` or ``lengths`` of the wrong shape, dtype, device or range.
            StreamingError: the state is of another model or batch.
            RoutingError: ``replay`` does not fit the model or the tokens.
        """
        tokens = without_padding("language_model", tokens, valid, self.embedding.weight, lengths)
        check_tokens("language_model", tokens, self.vocab_size)
        out = self.stack(self.embed(tokens), state, valid=valid, lengths=lengths, replay=replay)
        return ModelOutput(self.logits(out.x), out.state, out.routings, out.losses)

    def embed(self, tokens: Tensor) -> Tensor:
        """Features ``(B, L, D)`` of tokens ``(B, L)``, as the stack takes them."""
        return _embedded(self.embedding, tokens, scale=math.sqrt(self.stack.d_model))

    def logits(self, features: Tensor) -> Tensor:
        """Logits ``(..., vocab_size)`` of features ``(..., D)``, as the stack gives them."""
        if self.head is not None:
            out: Tensor = self.head(features)
            return out
        return linear(features.to(self.embedding.weight.device), self.embedding.weight)  # the stack may lie elsewhere


@dataclass(kw_only=True, frozen=True)
class EncoderConfig(StackConfig):
    """What the models that read a whole sequence share.

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


class _Encoder(Model):
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
        self, inputs: Tensor, valid: Tensor | None, lengths: Tensor | None, replay: Mapping[str, Routing] | None
    ) -> tuple[Tensor, dict[str, Routing], dict[str, Tensor]]:
        """Pooled features ``(B, D)``, routings and losses."""
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        inputs = without_padding(type(self).__name__, inputs, valid, weight, lengths)
        self._check(inputs)
        if self.vocab_size is None:
            x = self.embedding(inputs)
        else:
            x = _embedded(self.embedding, inputs, rounded=self.positions is None)  # once, behind the sum
        if self.positions is not None:
            column = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape)
            position = column if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
            x = x + self.positions(position).to(x)
        out = self.stack(x, valid=valid, lengths=lengths, replay=replay)
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


class Classifier(_Encoder):
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
    ) -> ModelOutput:
        """Logits ``(B, n_classes)``.

        Args:
            inputs: ``(B, L)`` token numbers, or real numbers when ``vocab_size`` is None.
            valid: ``(B, L)`` bool, True on real tokens; padding may hold anything. A row of padding is
                pooled to zeros.
            lengths: ``(B,)`` int64, instead of ``valid`` where all padding is on the right; spares the search for it.
            replay: routings whose decisions are taken over, by name.

        Raises:
            ShapeError: inputs of the wrong shape, dtype or range, or not finite; ``valid`` or ``lengths`` that do not
                fit them.
        """
        pooled, routings, losses = self._encode(inputs, valid, lengths, replay)
        return ModelOutput(self._classify(pooled), None, routings, losses)


class Retrieval(_Encoder):
    """Two texts through one encoder; the classifier reads ``[a, b, a * b, a - b]`` (LRA's matching task)."""

    @dataclass(kw_only=True, frozen=True)
    class Config(EncoderConfig):
        n_classes: int = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config, n_inputs=4)

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        *,
        valid: tuple[Tensor | None, Tensor | None] = (None, None),
        lengths: tuple[Tensor | None, Tensor | None] = (None, None),
        replay: Mapping[str, Routing] | None = None,
    ) -> ModelOutput:
        """Logits ``(B, n_classes)`` for pairs of sequences ``(B, L1)`` and ``(B, L2)``.

        Routings and losses are named ``first.layers...`` and ``second.layers...``.

        Raises:
            ShapeError: as for :class:`Classifier`, and for two batches of different sizes.
            RoutingError: ``replay`` does not fit the model or the inputs.
        """
        masks = _two_sides("valid", valid)
        counts = _two_sides("lengths", lengths)
        sizes = [tuple(side.shape) for side in (first, second) if isinstance(side, Tensor)]
        if len({size[:1] for size in sizes}) > 1:
            raise ShapeError(f"Retrieval: both sides must hold as many sequences, got {sizes[0]} and {sizes[1]}")
        for name in replay or {}:
            if not name.startswith(("first.", "second.")):
                raise RoutingError(f"replay: names begin with 'first.' or 'second.', got {name!r}")
        pooled: list[Tensor] = []
        routings: dict[str, Routing] = {}
        losses: dict[str, Tensor] = {}
        for side, inputs, mask, count in zip(("first", "second"), (first, second), masks, counts, strict=True):
            prefix = f"{side}."
            own = {name.removeprefix(prefix): r for name, r in (replay or {}).items() if name.startswith(prefix)}
            vector, side_routings, side_losses = self._encode(inputs, mask, count, own or None)
            pooled.append(vector)
            routings.update({prefix + name: routing for name, routing in side_routings.items()})
            losses.update({prefix + name: loss for name, loss in side_losses.items()})
        a, b = pooled
        return ModelOutput(self._classify(torch.cat([a, b, a * b, a - b], -1)), None, routings, losses)


def _two_sides(name: str, given: object) -> tuple[Tensor | None, ...]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ShapeError(
            f"Retrieval: {name} must be a pair, a tensor or None for each side, got {type(given).__name__}"
        )
    return tuple(given)
