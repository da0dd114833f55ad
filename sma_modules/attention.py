"""Ordinary multi-head softmax attention, to be activated sparsely or always on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeGuard

import torch
from torch import Tensor

from sma.configurable import BaseConfig
from sma.dropout import Dropout
from sma.errors import ShapeError
from sma.interfaces import Mixer, ModuleOutput
from sma.linear import Linear
from sma.memory import WorkingMemory
from sma.ops import compress, extract
from sma.routing import Packed
from sma.state import State
from sma_modules.local_attention import LocalAttention, initialise
from sma_modules.ops.rotary import rotary

if TYPE_CHECKING:
    from sma.stepping import Room
    from sma_modules.steppers import AttentionMixerStepper, AttentionStepper


class Attention(LocalAttention):
    """Multi-head attention of a Transformer (arXiv 1706.03762) over the activated tokens, with an optional window.

    Key heads may be fewer than query heads (grouped queries, arXiv 2305.13245). No residual, no norm. For streaming see
    :class:`~sma_modules.local_attention.LocalAttention`.

    Example:
        >>> attention = Attention.Config(n_heads=2).build(d_model=16, causal=True)
        >>> packed = Packed.from_mask(torch.tensor([[True, False, True]]))
        >>> attention(torch.randn(2, 16), packed).output.shape
        torch.Size([2, 16])
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(LocalAttention.Config):
        """Options.

        Attributes:
            window: as in the base, but unbounded by default.
            n_heads: query heads; must divide the width of the model.
            n_kv_heads: key and value heads; None for as many as query heads.
            qkv_bias: biases in the projection to queries, keys and values.
            positions: "rotary", or "none".
            hidden_dropout: on the output.
        """

        window: int | None = None
        n_heads: int = 8
        n_kv_heads: int | None = None
        qkv_bias: bool = True
        positions: Literal["none", "rotary"] = "rotary"
        hidden_dropout: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.n_heads >= 1, "n_heads", "must be at least 1")
            fits = self.n_kv_heads is None or (self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads == 0)
            self.require(fits, "n_kv_heads", f"must divide n_heads ({self.n_heads})")
            self.require(self.positions in ("none", "rotary"), "positions", "must be one of none, rotary")
            self.require(0 <= self.hidden_dropout < 1, "hidden_dropout", "must be in [0, 1)")

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.config: Attention.Config = config
        config.require(d_model % config.n_heads == 0, "n_heads", f"must divide d_model ({d_model})")
        self.width = d_model // config.n_heads
        even = config.positions != "rotary" or self.width % 2 == 0
        config.require(
            even, "n_heads", f"must leave an even width per head of d_model ({d_model}) for rotary positions"
        )
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        heads = config.n_heads + 2 * self.n_kv_heads
        self.qkv_proj = Linear(d_model, heads * self.width, bias=config.qkv_bias)
        self.out_proj = Linear(d_model, d_model)
        initialise(self.qkv_proj, self.out_proj)
        self.dropout = Dropout(config.hidden_dropout)

    def initial_state(self, batch: int, like: Tensor) -> State | None:
        """An empty memory; None for a module that does not stream."""
        row = like.new_empty(0, self.n_kv_heads, self.width)
        return self.empty_memory(batch, row, row)

    def stepper(self, room: Room) -> AttentionStepper:
        from sma_modules.steppers import AttentionStepper

        return AttentionStepper(self, room)

    def forward(self, x: Tensor, packed: Packed, state: State | None = None) -> ModuleOutput:
        """One chunk of activated tokens.

        Args:
            x: ``(K, D)``.
            packed: where the tokens come from.
            state: memory of earlier chunks; None for whole sequences.

        Returns:
            ``(K, D)`` and the memory after the chunk, None if none was given.

        Raises:
            ShapeError: ``x`` does not fit ``packed`` or the width of the model.
            StreamingError: a state is given to a module that does not stream, or does not fit.
        """
        self.check(x, packed, state)
        n_heads, n_kv_heads = self.config.n_heads, self.n_kv_heads
        qkv = self.qkv_proj(x).view(-1, n_heads + 2 * n_kv_heads, self.width)
        qk, v = qkv.split([n_heads + n_kv_heads, n_kv_heads], dim=1)
        if self.config.positions == "rotary":
            qk = rotary(qk, packed.position, self.config.rotary_theta)
        q, k = qk.split([n_heads, n_kv_heads], dim=1)
        out, memory = self.attend(q, k, v, packed, state)
        return ModuleOutput(self.dropout(self.out_proj(out.flatten(1))), memory)


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

    def stepper(self, room: Room) -> AttentionMixerStepper:
        from sma_modules.steppers import AttentionMixerStepper

        return AttentionMixerStepper(self, room)

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
        # Every token of the stream went into the memory, so what it has counted is the position of the next one.
        position = column + state.count[:, None] if _continues(state, batch) else column
        # In a graph there is room for padding too, as shapes are fixed there.
        room = batch * length if torch.compiler.is_compiling() else None
        packed = Packed.from_mask(mask, position, capacity=room)
        output, memory, _ = self.attention(compress(x, packed), packed, state)
        return extract(output, packed), None if state is None else memory
