"""The fallback steppers: they call the part, a token at a time, with a state that is a value."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from sma.ops.backend import concrete
from sma.ops.compress import compress
from sma.ops.extract import extract
from sma.routing import Packed
from sma.state import State
from sma.steppers import (
    ActivatedStepper,
    BlockStepper,
    Decision,
    MixerStepper,
    ModuleStepper,
    SlotSpec,
    StepContext,
    Stepped,
    Stepper,
    choose,
)
from sma.wrap.windows import call_windowed


class FallbackStepper(Stepper):
    """A state of all slots as a value, with those that came before it.

    Args:
        module: the part, which is called.
        spec: what the stepper is built for.
        reason: why the part does not decode by a stepper of its own; None where its class brings none.
        initial: the state of all slots; None for that of the part before the first token.
    """

    def __init__(
        self, module: nn.Module, spec: SlotSpec, reason: str | None = None, initial: State | None = None
    ) -> None:
        self.module = module
        self.uncaptured = (
            f"{type(module).__name__} has no stepper of its own, and a CUDA graph cannot hold its forward"
            if reason is None
            else f"{reason}: it is called, and a CUDA graph cannot hold that"
        )
        if initial is None:
            initial = module.initial_state(spec.slots, spec.like)  # type: ignore[operator]
        self._states: deque[State | None] = deque([initial] * (spec.rollback + 1), maxlen=spec.rollback + 1)

    @property
    def state(self) -> State | None:
        """What the next token follows."""
        return self._states[-1]

    def push(self, state: State | None, live: Tensor) -> None:
        """The state after one more token of the ``live (S,)`` slots. The state of the others does not change."""
        if state is None:
            return
        state, before = state.detach(), list(self._states)
        if len(before) > 1 and not bool(live.all()):
            for age in range(1, len(before)):
                newer, older = before[-age], before[-1 - age]
                assert newer is not None
                assert older is not None
                self._states[-age] = _chosen(live, newer, older)
        self._states.append(state)

    def memory(self) -> tuple[Tensor, ...]:
        different = {id(state): state for state in self._states if state is not None}
        return tuple(tensor for state in different.values() for tensor in state.tensors())

    def read(self, slots: Tensor, position: Tensor) -> State | None:
        return None if self.state is None else self.state.reorder(slots)

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        if self.state is not None and state is not None:
            self._states[-1] = self.state.put(slots, state)

    def rolled_back(self, slot: int, tokens: int) -> None:
        if self.state is None or not tokens:
            return
        states = [state for state in self._states if state is not None]
        if not states[-1].tensors():
            return
        index = torch.tensor([slot], device=states[-1].tensors()[0].device)
        for age in range(len(states)):
            before = states[max(len(states) - 1 - age - tokens, 0)]
            self._states[-1 - age] = states[-1 - age].put(index, before.select(slot))


def _chosen(live: Tensor, new: State, old: State) -> State:
    """Rows of ``new`` that are ``live (S,)``, of ``old`` where not."""
    before = iter(old.tensors())
    return new.map(lambda tensor: choose(live, tensor, next(before)))


class FallbackMixer(FallbackStepper, MixerStepper):
    """A mixer, called with a token at a time."""

    def step(self, x: Tensor, context: StepContext) -> Tensor:
        y, state = self.module(x[:, None], self.state, lengths=context.live.long())
        self.push(state, context.live)
        out: Tensor = y.squeeze(1)
        return out.masked_fill(~context.live[:, None], 0)


class FallbackModule(FallbackStepper, ModuleStepper):
    """A module of layout "packed", called with the tokens that are active."""

    def call(self, x: Tensor, packed: Packed) -> tuple[Tensor, State | None]:
        """Outputs ``(K, D)`` and the state after them."""
        result = self.module(x, packed, self.state)
        return result[0], result[1]

    def step(self, x: Tensor, active: Tensor, context: StepContext) -> Tensor:
        # The capacity of an exported graph suffices for all tokens, as shapes are fixed there.
        capacity = x.shape[0] if torch.compiler.is_compiling() else None
        packed = Packed.from_mask(active[:, None], context.position[:, None], capacity=capacity)
        output, state = self.call(compress(x[:, None], packed), packed)
        self.push(state, context.live)
        return extract(output, packed).squeeze(1)


class WindowedModule(FallbackModule):
    """A module of layout "padded" over its working memory, see :mod:`sma.wrap.windows`."""

    def __init__(self, module: nn.Module, window: int, initial: State | None, spec: SlotSpec) -> None:
        super().__init__(module, spec, None, initial)
        self.window = window

    def call(self, x: Tensor, packed: Packed) -> tuple[Tensor, State | None]:
        result = call_windowed(self.module, x, packed, self.state, self.window)
        return result.output, result.state


class TokenModule(ModuleStepper):
    """A module that works token by token: it has no memory.

    On an accelerator and in an exported graph it runs on every slot. That does not synchronise with the device, and the
    weights are read once, for one row or for a few.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def read(self, slots: Tensor, position: Tensor) -> None:
        return None

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        return None

    def step(self, x: Tensor, active: Tensor, context: StepContext) -> Tensor:
        if not concrete(active):
            return _first(self.module(x))
        rows = active.nonzero().squeeze(1)
        output = _first(self.module(x.index_select(0, rows)))
        return output.new_zeros(x.shape[0], *output.shape[1:]).index_copy(0, rows, output)


def _first(result: Any) -> Tensor:
    out: Tensor = result if isinstance(result, Tensor) else result[0]
    return out


class FallbackActivated(FallbackStepper, ActivatedStepper):
    """A sparsely activated layer, called with a token at a time."""

    def step(self, x: Tensor, context: StepContext, logits: Tensor | None = None) -> tuple[Tensor, Decision]:
        options = {} if logits is None else {"logits": logits[:, None]}
        output, state, routing, _ = self.module(x[:, None], self.state, valid=context.live[:, None], **options)
        self.push(state, context.live)
        return output.squeeze(1), Decision(routing.active[:, 0], routing.confidence[:, 0])


class FallbackBlock(FallbackStepper, BlockStepper):
    """A block, called with a token at a time."""

    def step(self, x: Tensor, context: StepContext) -> Stepped:
        out = self.module(x[:, None], self.state, lengths=context.live.long())
        self.push(out.state, context.live)
        decisions = {
            name: Decision(routing.active[:, 0], routing.confidence[:, 0]) for name, routing in out.routings.items()
        }
        return Stepped(out.x.squeeze(1).masked_fill(~context.live[:, None], 0), decisions)
