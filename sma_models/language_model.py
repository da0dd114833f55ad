"""The causal language model, and how it decodes in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sma.decode.choice import block_stepper
from sma.decode.fallback import FallbackStepper
from sma.errors import StreamingError
from sma.interfaces import Model
from sma.routing import Routing
from sma.runtime.onednn import PLAIN_WEIGHTS, linear
from sma.runtime.plain import DROPOUTS, PartsWatch, project, unwrapped, watched_parts, why_called
from sma.state import State, misfit
from sma.steppers import Decision, SlotSpec, StepContext, Stepper, normalised
from sma_models.embeddings import TokenEmbedding, embedded, like_of
from sma_models.model_io import ModelOutput, check_tokens, without_padding
from sma_models.stack import HiddenStates, Stack, StackConfig, StackState


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
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, 0.0, config.d_model**-0.5)

    def initial_state(self, batch: int) -> StackState:
        """The state before the first token of ``batch`` sequences.

        Raises:
            StreamingError: a part of the model cannot stream; the message says why.
        """
        return self.stack.initial_state(batch, like_of(self.embedding))

    def forward(
        self,
        tokens: Tensor,
        state: StackState | None = None,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
        hidden: HiddenStates | None = None,
    ) -> ModelOutput:
        """Logits of the next token at every position.

        Args:
            tokens: ``(B, L)`` integers; any L, also 1 or 0.
            state: from :meth:`initial_state` or the previous chunk; None runs whole sequences.
            valid: ``(B, L)`` bool, True on real tokens; padding may lie anywhere and hold anything.
            lengths: ``(B,)`` int64, instead of ``valid`` where all padding is on the right; spares the search for it.
            replay: routings whose decisions are taken over, by name.
            hidden: is filled with the features between the blocks.

        Raises:
            ShapeError: tokens, ``valid`` or ``lengths`` of the wrong shape, dtype, device or range.
            StreamingError: the state is of another model or batch.
            RoutingError: ``replay`` does not fit the model or the tokens.
        """
        tokens = without_padding("language_model", tokens, valid, like_of(self.embedding), lengths)
        check_tokens("language_model", tokens, self.vocab_size)
        out = self.stack(self.embed(tokens), state, valid=valid, lengths=lengths, replay=replay, hidden=hidden)
        return ModelOutput(self.logits(out.x), out.state, out.routings, out.losses)

    def embed(self, tokens: Tensor) -> Tensor:
        """Features ``(B, L, D)`` of tokens ``(B, L)``, as the stack takes them."""
        return embedded(self.embedding, tokens, scale=math.sqrt(self.stack.d_model))

    def logits(self, features: Tensor) -> Tensor:
        """Logits ``(..., vocab_size)`` of features ``(..., D)``, as the stack gives them."""
        if self.head is not None:
            out: Tensor = project(self.head, features)
            return out
        weight = self.embedding.weight  # of a parametrised embedding computed here
        features = features.to(weight.device)  # the stack may lie elsewhere
        if type(weight) not in PLAIN_WEIGHTS and isinstance(unwrapped(self.embedding), TokenEmbedding):
            return self.embedding(features)  # type: ignore[no-any-return]  # sharded: whole inside a call only
        return linear(features, weight)


class ModelStepper(Stepper):
    """A language model that decodes.

    A model whose stack is plain decodes layer by layer; another one is called, with its state as a value. The choice
    holds for the parts as they were when the stepper was built: :meth:`outdated` says when to build another.
    """

    def __init__(self, model: LanguageModel, spec: SlotSpec) -> None:
        self.model = model
        self._empty = model.stack.initial_state(1, spec.like.to("meta"))  # shapes, without memory
        self._form = self._empty.form()
        self._watch = None if torch.compiler.is_compiling() else PartsWatch(model)
        reason = why_called(model, LanguageModel) or why_called(model.stack, Stack)
        reason = reason or why_called(model.stack.dropout, DROPOUTS)
        initial = model.stack.initial_state(spec.slots, spec.like) if reason is not None else None
        self.whole = None if reason is None else FallbackStepper(model, spec, reason, initial)
        self.layers = [] if self.whole is not None else [block_stepper(layer, spec) for layer in model.stack.layers]

    def outdated(self) -> bool:
        """Whether a part of the model was replaced, wrapped or hooked since, so that the choice may be another."""
        return self._watch is not None and self._watch.changed()

    def why_uncaptured(self) -> dict[str, str]:
        watched = watched_parts(self.model).items()
        hooks = {name.removeprefix("stack."): f"{reason}: a CUDA graph would not run them" for name, reason in watched}
        return super().why_uncaptured() | hooks

    def parts(self) -> dict[str, Stepper]:
        whole: dict[str, Stepper] = {} if self.whole is None else {"": self.whole}
        return whole | {f"layers.{i}": layer for i, layer in enumerate(self.layers)}

    def read(self, slots: Tensor, position: Tensor) -> StackState:
        if self.whole is not None:
            return cast("StackState", self.whole.read(slots, position))
        return StackState(tuple(layer.read(slots, position) for layer in self.layers))

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        self.check(state)
        assert isinstance(state, StackState)
        if self.whole is not None:
            self.whole.write(slots, state, position)
        for layer, own in zip(self.layers, state.layers, strict=self.whole is None):
            layer.write(slots, own, position)

    def check(self, state: object) -> None:
        """Refuse a state that is not of the model, before any of it is written.

        Raises:
            StreamingError: it is of another model.
        """
        if not isinstance(state, StackState):
            raise StreamingError(f"state: must be a StackState, got {type(state).__name__}")
        problem = misfit(self._empty, state, self._form)
        if problem is not None:
            raise StreamingError(f"state: does not fit the model: {problem}")

    def step(self, tokens: Tensor, context: StepContext) -> tuple[Tensor, dict[str, Decision]]:
        """Logits ``(S, V)`` for ``tokens (S,)``, and the decisions by the name of the layer."""
        if self.whole is not None:
            return self._called(self.whole, tokens, context)
        x = self.model.embed(tokens[:, None]).squeeze(1)
        decisions: dict[str, Decision] = {}
        for i, layer in enumerate(self.layers):
            x, own = layer.step(x, context)
            decisions.update({f"layers.{i}.{name}": decision for name, decision in own.items()})
        return self.model.logits(normalised(self.model.stack.final_norm, x)), decisions

    def _called(
        self, whole: FallbackStepper, tokens: Tensor, context: StepContext
    ) -> tuple[Tensor, dict[str, Decision]]:
        out = self.model(tokens[:, None], whole.state, lengths=context.live.long())
        whole.push(out.state, context.live)
        decisions = {name: Decision(each.active[:, 0], each.confidence[:, 0]) for name, each in out.routings.items()}
        return out.logits.squeeze(1), decisions
