"""Multi-head softmax attention, to be activated sparsely or always on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sma.dropout import Dropout
from sma.interfaces import ModuleOutput
from sma.routing import Packed
from sma.runtime.plain import project
from sma.state import State
from sma.steppers import SlotSpec, StepContext
from sma_modules.modules.local_attention import LocalAttention, RingStepper, initialise
from sma_modules.ops.ring_attention import ring_attention
from sma_modules.ops.rotary import rotary


class Attention(LocalAttention):
    """Multi-head attention of a Transformer (arXiv 1706.03762) over the activated tokens, with an optional window.

    Key heads may be fewer than query heads (grouped queries, arXiv 2305.13245). No residual, no norm. For streaming see
    :class:`~sma_modules.modules.local_attention.LocalAttention`.

    Example:
        >>> import torch
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
        self.qkv_proj = nn.Linear(d_model, heads * self.width, bias=config.qkv_bias)
        self.out_proj = nn.Linear(d_model, d_model)
        initialise(self.qkv_proj, self.out_proj)
        self.dropout = Dropout(config.hidden_dropout)

    def initial_state(self, batch: int, like: Tensor) -> State | None:
        """An empty memory; None for a module that does not stream."""
        row = like.new_empty(0, self.n_kv_heads, self.width)
        return self.empty_memory(batch, row, row)

    def stepper(self, spec: SlotSpec) -> AttentionStepper:
        return AttentionStepper(self, spec)

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
        qkv = project(self.qkv_proj, x).view(-1, n_heads + 2 * n_kv_heads, self.width)
        qk, v = qkv.split_with_sizes([n_heads + n_kv_heads, n_kv_heads], dim=1)
        if self.config.positions == "rotary":
            qk = rotary(qk, packed.position, self.config.rotary_theta)
        q, k = qk.split_with_sizes([n_heads, n_kv_heads], dim=1)
        out, memory = self.attend(q, k, v, packed, state)
        return ModuleOutput(self.dropout(project(self.out_proj, out.flatten(1))), memory)


class AttentionStepper(RingStepper):
    """Multi-head attention."""

    def __init__(self, module: Attention, spec: SlotSpec) -> None:
        super().__init__(module, spec, module.n_kv_heads, module.width, module.width)
        self.module = module

    def step(self, x: Tensor, active: Tensor, context: StepContext) -> Tensor:
        return self.at(x, active, context, context.position)

    def at(self, x: Tensor, active: Tensor, context: StepContext, position: Tensor) -> Tensor:
        """The same, with the original positions ``(S,)`` of the tokens."""
        module, heads, groups = self.module, self.module.config.n_heads, self.module.n_kv_heads
        qkv = project(module.qkv_proj, x).view(-1, heads + 2 * groups, module.width)
        qk, v = qkv.split_with_sizes([heads + groups, groups], dim=1)
        if module.config.positions == "rotary":
            qk = rotary(qk, position, module.config.rotary_theta)
        q, k = qk.split_with_sizes([heads, groups], dim=1)
        out = ring_attention(
            q,
            k,
            v,
            self.ring,
            active=active,
            live=context.live,
            position=context.position,
            at=position,
            window=module.window,
            chunk=module.chunk,
        )
        projected: Tensor = module.dropout(project(module.out_proj, out.flatten(1)))
        return projected
