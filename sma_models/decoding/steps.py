"""The stepper of a language model: embedding, blocks, final norm and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sma.errors import StreamingError
from sma.interfaces import Block
from sma.layer import ActivatedState
from sma.state import State, misfit
from sma.stepping import Decision, Moment, Room, Stepper, normalised
from sma_models.heads import LanguageModel
from sma_models.stack import StackState


class ModelStepper(Stepper):
    """A language model that decodes."""

    def __init__(self, model: LanguageModel, room: Room) -> None:
        self.model = model
        self._empty = model.stack.initial_state(1, room.like.to("meta"))  # shapes, without memory
        self._form = self._empty.form()
        self.layers = [layer.stepper(room) for layer in model.stack.layers if isinstance(layer, Block)]

    def parts(self) -> dict[str, Stepper]:
        return {f"layers.{i}": layer for i, layer in enumerate(self.layers)}

    def read(self, slots: Tensor, position: Tensor) -> StackState:
        return StackState(tuple(layer.read(slots, position) for layer in self.layers))

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        self.check(state)
        assert isinstance(state, StackState)
        for layer, own in zip(self.layers, state.layers, strict=True):
            layer.write(slots, own, position)

    def check(self, state: object) -> None:
        """Refuse what is no state of the model, before any of it is written.

        Raises:
            StreamingError: it is of another model.
        """
        if not isinstance(state, StackState):
            raise StreamingError(f"state: must be a StackState, got {type(state).__name__}")
        problem = misfit(self._empty, state, self._form)
        if problem is not None:
            raise StreamingError(f"state: does not fit the model: {problem}")

    def step(self, tokens: Tensor, moment: Moment) -> tuple[Tensor, dict[str, Decision]]:
        """Logits ``(S, V)`` for ``tokens (S,)``, and who was active, by the name of the layer."""
        x = self.model.embed(tokens[:, None]).squeeze(1)
        decisions: dict[str, Decision] = {}
        for i, layer in enumerate(self.layers):
            x, own = layer.step(x, moment)
            decisions.update({f"layers.{i}.{name}": decision for name, decision in own.items()})
        return self.model.logits(normalised(self.model.stack.final_norm, x)), decisions


def position_of(state: StackState, *, checked: bool = False) -> Tensor:
    """``(B,)`` int64: real tokens that went by, as the layers that decide have counted them.

    Where no layer does, nothing depends on it, and it is zero.

    Args:
        state: of a model.
        checked: two layers are known to agree; otherwise the device is waited for, to compare them.

    Raises:
        StreamingError: the state holds nothing, or two layers disagree.
    """
    layers = (each.seen for each in _inside(state) if isinstance(each, ActivatedState))
    first = next(layers, None)
    if first is None:
        tensors = state.tensors()
        if not tensors:
            raise StreamingError("state: holds no tensor")
        return torch.zeros(tensors[0].shape[0], dtype=torch.int64, device=tensors[0].device)
    if checked or torch.compiler.is_compiling():
        return first
    seen = [first, *layers]
    if len(seen) == 1:
        return first
    same = all(each.shape == seen[0].shape for each in seen)
    # A device is waited for only once.
    if not same or bool((torch.stack([each.to(seen[0].device) for each in seen]) != seen[0]).any()):
        raise StreamingError(
            f"state: every layer must have seen as many tokens, got {[each.tolist() for each in seen]}"
        )
    return seen[0]


def _inside(value: Any) -> Iterator[State]:
    """The states in a state, itself included."""
    if isinstance(value, State):
        yield value
        for field in fields(value):
            yield from _inside(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _inside(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _inside(item)
