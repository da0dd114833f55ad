"""The base of modules that attend to their working memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sma.errors import ShapeError, StreamingError
from sma.interfaces import Module
from sma.routing import Packed
from sma.state import State
from sma.steppers import ModuleStepper, SlotSpec, StepContext
from sma.working_memory import WorkingMemory
from sma_modules.ops.ring_attention import Ring
from sma_modules.ops.window_attention import Activation, Bias, window_attention


class LocalAttention(Module):
    """Base of modules that attend over the activated tokens with a window, a chunk or no bound.

    A causal one with a bound streams: its state is a :class:`~sma.working_memory.WorkingMemory` whose rows are keys
    ``(B, C, H, z)``, values ``(B, C, H, h)`` and original positions ``(B, C)``, for the last C = min(window, chunk - 1)
    activated tokens.
    """

    layout = "packed"

    @dataclass(kw_only=True, frozen=True)
    class Config(Module.Config):
        """Options of the attention.

        Attributes:
            window: activated tokens visible to each side (causal: before) besides the own one; None is no bound.
            chunk: only tokens of the same chunk of the compressed sequence are visible; None is one chunk.
            attention_dropout: on the weights.
            rotary_theta: base of the wavelengths of rotary positions.
        """

        window: int | None = 128
        chunk: int | None = None
        attention_dropout: float = 0.0
        rotary_theta: float = 10000.0

        def __post_init__(self) -> None:
            self.require(self.window is None or self.window >= 1, "window", "must be at least 1 or null")
            self.require(self.chunk is None or self.chunk >= 1, "chunk", "must be at least 1 or null")
            self.require(0 <= self.attention_dropout < 1, "attention_dropout", "must be in [0, 1)")
            self.require(self.rotary_theta > 0, "rotary_theta", "must be positive")

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.window, self.chunk, self.attention_dropout = config.window, config.chunk, config.attention_dropout
        self.streams = causal and self.attention_window() is not None

    def attention_window(self) -> int | None:
        """How far a token sees in the compressed sequence: the smaller of window and chunk - 1."""
        if self.chunk is None:
            return self.window
        return self.chunk - 1 if self.window is None else min(self.window, self.chunk - 1)

    def empty_memory(self, batch: int, key: Tensor, value: Tensor) -> WorkingMemory | None:
        """A memory of nothing for rows like ``key (0, H, z)`` and ``value (0, H, h)``; None if this does not stream."""
        capacity = self.attention_window()
        if not self.streams or capacity is None:
            return None
        return WorkingMemory.empty(batch, capacity, key, value, torch.empty(0, dtype=torch.int64, device=key.device))

    def check(self, x: Tensor, packed: Packed, state: State | None) -> None:
        """Refuse tokens ``x`` and a state that do not fit.

        Raises:
            ShapeError: ``x`` is not ``(K, d_model)`` with the K tokens of ``packed``.
            StreamingError: a state is given to what does not stream, or is of another kind or capacity.
        """
        name = type(self).__name__
        if x.shape != (packed.index.numel(), self.d_model):
            raise ShapeError(f"{name}: tokens must be ({packed.index.numel()}, {self.d_model}), got {tuple(x.shape)}")
        if state is None:
            return
        if not self.streams:
            raise StreamingError(
                f"{name}: only causal modules with a window or a chunk take a state, got causal={self.causal}, "
                f"window={self.window}, chunk={self.chunk}"
            )
        if not isinstance(state, WorkingMemory) or state.capacity != self.attention_window():
            held = f"one of {state.capacity}" if isinstance(state, WorkingMemory) else type(state).__name__
            raise StreamingError(f"{name}: needs a WorkingMemory of {self.attention_window()} tokens, got {held}")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Packed,
        state: State | None,
        *,
        activation: Activation = "softmax",
        bias: Bias = "none",
        table: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, WorkingMemory | None]:
        """Attention of new tokens to themselves and to what is remembered.

        Args:
            q: ``(K, H, z)``; if rotary, already rotated, like the keys.
            k: ``(K, G, z)`` with G dividing H: every key head serves H / G query heads.
            v: ``(K, G, h)``.
            packed: where the tokens come from.
            state: memory before them, or None.
            activation: as for :func:`~sma_modules.ops.window_attention.window_attention`, like the rest.
            bias: what the table is indexed by.
            table: biases.
            gate: ``(K, H, h)`` what the result is multiplied with, or None.

        Returns:
            ``(K, H, h)`` and the memory after the tokens, None if none was given.
        """
        position, k_cu, start, memory = packed.position, packed.cu_seqlens, None, None
        max_k, capacity = packed.max_length, self.attention_window() or 0
        if isinstance(state, WorkingMemory):
            (k, v, position), k_cu, start, memory = state.append(packed, k, v, packed.position)
            max_k = k.shape[0] if packed.fixed else max_k + capacity
        out = window_attention(
            q,
            k,
            v,
            q_cu=packed.cu_seqlens,
            k_cu=k_cu,
            k_start=start,
            q_position=packed.position,
            k_position=position,
            max_q=packed.max_length,
            max_k=max_k,
            causal=self.causal,
            window=self.window,
            chunk=self.chunk,
            activation=activation,
            bias=bias,
            bias_table=table,
            dropout=self.attention_dropout if self.training else 0.0,
            gate=gate,
        )
        return out, memory


def initialise(*linears: nn.Linear | nn.Parameter) -> None:
    """Weights ~ N(0, 0.02) truncated at two standard deviations, biases 0."""
    for linear in linears:
        nn.init.trunc_normal_(linear.weight if isinstance(linear, nn.Linear) else linear, std=0.02, a=-0.04, b=0.04)
        if isinstance(linear, nn.Linear) and linear.bias is not None:
            nn.init.zeros_(linear.bias)


class RingStepper(ModuleStepper):
    """The steppers of modules that attend to their working memory: a ring."""

    def __init__(self, module: LocalAttention, spec: SlotSpec, heads: int, d_key: int, d_value: int) -> None:
        reach = module.attention_window()
        if not module.streams or reach is None:
            bound = "has no bounded memory" if module.causal else "looks ahead"
            raise StreamingError(f"{type(module).__name__}: cannot stream: it {bound}")
        self.ring = Ring.empty(spec, reach, heads, d_key, d_value)
        self.d_out = module.d_model

    def memory(self) -> tuple[Tensor, ...]:
        return self.ring.tensors()

    def read(self, slots: Tensor, position: Tensor) -> State:
        return self.ring.read(slots, position)

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        self.ring.write(slots, state, position)

    def idle(self, context: StepContext) -> None:
        self.ring.advance(context.live, context.position, self.ring.count(context.position))
