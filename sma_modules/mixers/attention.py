"""Multi-head attention as an always-on sequence layer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from sma.configurable import BaseConfig
from sma.errors import ShapeError
from sma.interfaces import Mixer
from sma.ops.compress import compress
from sma.ops.extract import extract
from sma.routing import Packed
from sma.runtime.plain import is_plain
from sma.state import State
from sma.steppers import MixerStepper, SlotSpec, StepContext, Stepper
from sma.working_memory import WorkingMemory
from sma_modules.modules.attention import Attention, AttentionStepper


def _continues(state: State | None, batch: int) -> TypeGuard[WorkingMemory]:
    return isinstance(state, WorkingMemory) and state.count.shape[0] == batch


class AttentionMixer(Mixer):
    """:class:`Attention` as an always-on sequence layer: every real token takes part.

    A causal one with a window or a chunk streams.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(Mixer.Config):
        """The options of :class:`Attention`.

        Attributes:
            window: earlier tokens (and later ones, if not causal) visible besides the own one; None is no bound.
            chunk: only tokens of the same chunk are visible; None is one chunk.
            n_heads: query heads; must divide the width of the model.
            n_kv_heads: key and value heads; None for as many as query heads.
            qkv_bias: biases in the projection to queries, keys and values.
            positions: "rotary", or "none".
            rotary_theta: base of the wavelengths of "rotary".
            attention_dropout: on the weights.
            hidden_dropout: on the output.
        """

        window: int | None = None
        chunk: int | None = None
        n_heads: int = 8
        n_kv_heads: int | None = None
        qkv_bias: bool = True
        positions: Literal["none", "rotary"] = "rotary"
        rotary_theta: float = 10000.0
        attention_dropout: float = 0.0
        hidden_dropout: float = 0.0

        def __post_init__(self) -> None:
            self.inner()

        def inner(self) -> Attention.Config:
            """The same options for :class:`Attention`, which checks them."""
            own = {field.name for field in fields(BaseConfig)}
            return Attention.Config(**{f.name: getattr(self, f.name) for f in fields(self) if f.name not in own})

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.config: AttentionMixer.Config = config
        self.attention: Attention = config.inner().build(d_model=d_model, causal=causal)
        self.streams = self.attention.streams

    def initial_state(self, batch: int, like: Tensor) -> State | None:
        """An empty memory.

        Raises:
            StreamingError: the mixer looks ahead, or its memory has no bound.
        """
        super().initial_state(batch, like)
        return self.attention.initial_state(batch, like)

    def stepper(self, spec: SlotSpec) -> AttentionMixerStepper | None:
        return AttentionMixerStepper(self, spec) if is_plain(self.attention, Attention) else None

    def forward(
        self, x: Tensor, state: State | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """One chunk of every sequence.

        Args:
            x: ``(B, L, D)``, right-padded.
            state: memory of earlier chunks; None for whole sequences.
            lengths: ``(B,)`` int64 real tokens per row; None means all.

        Returns:
            ``(B, L, D)``, zero at padding, and, given a state, the memory after the last real tokens.

        Raises:
            ShapeError: ``x`` is not ``(B, L, d_model)``.
            StreamingError: a state is given to a mixer that does not stream, or does not fit.
        """
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ShapeError(f"AttentionMixer: x must be (B, L, {self.d_model}), got {tuple(x.shape)}")
        batch, length = x.shape[:2]
        column = torch.arange(length, device=x.device).expand(batch, length)
        mask = torch.ones_like(column, dtype=torch.bool) if lengths is None else column < lengths[:, None]
        # The memory counts every token of the stream, so its count is the position of the next one.
        position = column + state.count[:, None] if _continues(state, batch) else column
        # The capacity of a graph suffices for padding too, as shapes are fixed there.
        capacity = batch * length if torch.compiler.is_compiling() else None
        packed = Packed.from_mask(mask, position, capacity=capacity)
        output, memory, _ = self.attention(compress(x, packed), packed, state)
        return extract(output, packed), None if state is None else memory


class AttentionMixerStepper(MixerStepper):
    """Multi-head attention of every token. Its memory counts them, and so knows the position."""

    def __init__(self, mixer: AttentionMixer, spec: SlotSpec) -> None:
        mixer.initial_state(0, spec.like)  # raises if it cannot stream
        self.inner = AttentionStepper(mixer.attention, spec)

    def parts(self) -> dict[str, Stepper]:
        return {"attention": self.inner}

    def read(self, slots: Tensor, position: Tensor) -> State:
        return self.inner.read(slots, position)

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        self.inner.write(slots, state, position)

    def step(self, x: Tensor, context: StepContext) -> Tensor:
        return self.inner.at(x, context.live, context, self.inner.ring.count(context.position))
