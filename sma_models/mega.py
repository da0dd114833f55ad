"""The MEGA layer (arXiv 2209.10655): an EMA and gated single-head attention at every token, full or within chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma.activated import ActivatedState
from sma.decode.choice import activated_stepper, block_stepper, mixer_stepper
from sma.dropout import Dropout
from sma.interfaces import Block, BlockOutput, Mixer, Module, ModuleOutput, Norm, activated_by
from sma.layer import SparselyActivated
from sma.routing import Packed, Routing
from sma.runtime.plain import project
from sma.state import State
from sma.steppers import BlockStepper, SlotSpec, StepContext, Stepped, Stepper, normalised
from sma_models.hybrid import Sublayer, SublayerConfig, always_on
from sma_modules.mixers.ema import EMA
from sma_modules.modules.gau import SingleHead, SingleHeadStepper
from sma_modules.modules.local_attention import initialise
from sma_modules.norms import LayerNorm
from sma_modules.ops.gau_inputs.eager import queries_and_keys


class MegaAttention(SingleHead):
    """Takes ``[Z | V]`` as its tokens, ``(K, d_qk + d_v)``, and returns the attention's output, ``(K, d_v)``."""

    def stepper(self, spec: SlotSpec) -> MegaAttentionStepper:
        return MegaAttentionStepper(self, spec)

    def forward(self, x: Tensor, packed: Packed, state: State | None = None) -> ModuleOutput:
        """One chunk; see :class:`~sma_modules.modules.gau.SingleHead`."""
        self.check(x, packed, state)
        z, v = x.split_with_sizes([self.config.d_qk, self.d_v], dim=-1)
        return ModuleOutput(*self.attend_shared(z, v, packed, state))


class Gates(NamedTuple):
    """What the attention's output is combined with, before any sigmoid: ``u``, ``r`` (already activated) and ``H``."""

    update: Tensor
    r: Tensor
    h: Tensor


@dataclass(frozen=True)
class MegaState(State):
    """The state of the mixer, of the attention and of the feed-forward network."""

    mixer: State | None
    attention: ActivatedState
    ffn: State | None


class Mega(Block):
    """``m = SiLU(EMA(norm(x)))``, attention with Z from m and V from norm(x), an update gate, then a feed-forward
    network.

    With n the normalised input and everything but the attention token by token::

        [U | Z R | H] = W m;  u = sigmoid(U);  z, r = SiLU(Z R);  v = SiLU(W_v n)
        y = x + u * (dropout(SiLU(H + W_h(attention(z, v) * r))) - x)
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(Block.Config):
        """Options.

        Attributes:
            mixer: the moving average.
            attention: its sizes, positions, and ``chunk``; ``window: null, chunk: null`` is full attention.
            ffn: the feed-forward network behind it, or None.
            norm: of both.
            prenorm: normalise in front of each part instead of behind.
            dropout: on m, on the new value and on the feed-forward network's output.
        """

        mixer: Mixer.Config = field(default_factory=EMA.Config)
        attention: MegaAttention.Config = field(default_factory=lambda: MegaAttention.Config(window=None))
        ffn: Module.Config | None = None
        norm: Norm.Config = field(default_factory=LayerNorm.Config)
        prenorm: bool = True
        dropout: float = 0.0

        def __post_init__(self) -> None:
            self.require(0 <= self.dropout < 1, "dropout", "must lie in [0, 1)")

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.prenorm = config.prenorm
        self.norm = config.norm.build(d_model=d_model)
        self.mixer = config.mixer.build(d_model=d_model, causal=causal)
        self.d_qk, self.d_v = config.attention.d_qk, config.attention.d_v or 2 * d_model
        attention = replace(config.attention, d_v=self.d_v).build(d_model=self.d_qk + self.d_v, causal=causal)
        self.attention: SparselyActivated = always_on(attention, causal=causal)
        self.v_proj = nn.Linear(d_model, self.d_v)
        self.mx_proj = nn.Linear(d_model, 2 * d_model + self.d_qk + self.d_v)
        self.h_proj = nn.Linear(self.d_v, d_model)
        initialise(self.v_proj, self.mx_proj, self.h_proj)
        self.dropout = Dropout(config.dropout)
        sublayer = SublayerConfig(module=config.ffn, norm=config.norm, dropout=config.dropout) if config.ffn else None
        self.ffn = sublayer.build(d_model=d_model, causal=causal, prenorm=config.prenorm) if sublayer else None

    def initial_state(self, batch: int, like: Tensor) -> MegaState:
        attention = self.attention.initial_state(batch, like)
        ffn = self.ffn.initial_state(batch, like) if self.ffn is not None else None
        return MegaState(self.mixer.initial_state(batch, like), attention, ffn)

    def stepper(self, spec: SlotSpec) -> MegaStepper:
        return MegaStepper(self, spec)

    def forward(
        self,
        x: Tensor,
        state: MegaState | None = None,
        *,
        lengths: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> BlockOutput:
        """One layer; see :class:`sma.interfaces.Block`. Nothing is routed, so ``replay`` has no effect."""
        residual = x
        if self.prenorm:
            x = self.norm(x, lengths=lengths)
        m, mixer_state = activated_by(self.mixer, x, state.mixer if state else None, lengths, self.dropout)
        tokens, gates = self.inputs(m, x)
        attended = self.attention(tokens, state.attention if state else None, lengths=lengths)
        y = self.updated(residual, attended.output, gates)
        if not self.prenorm:
            y = self.norm(y, lengths=lengths)
        out = BlockOutput(y)
        if self.ffn is not None:
            out = self.ffn(y, state.ffn if state else None, lengths=lengths)
        after = None if attended.state is None else MegaState(mixer_state, attended.state, out.state)
        return BlockOutput(
            out.x, after, {}, {name.replace("module", "ffn", 1): loss for name, loss in out.losses.items()}
        )

    def inputs(self, m: Tensor, x: Tensor) -> tuple[Tensor, Gates]:
        """The tokens ``[Z | V]`` of the attention and the gates, from ``m`` and the normalised input ``(..., D)``."""
        update, zr, h = project(self.mx_proj, m).split_with_sizes(
            [self.d_model, self.d_qk + self.d_v, self.d_model], -1
        )
        z, r = F.silu(zr).split_with_sizes([self.d_qk, self.d_v], -1)
        return torch.cat([z, F.silu(project(self.v_proj, x))], -1), Gates(update, r, h)

    def updated(self, residual: Tensor, attended: Tensor, gates: Gates) -> Tensor:
        """``residual + u * (new - residual)``."""
        new = self.dropout(F.silu(gates.h + project(self.h_proj, attended * gates.r)))
        # Under autocast the residual keeps its dtype, and lerp takes no mixture.
        return torch.lerp(residual, new.to(residual.dtype), gates.update.sigmoid().to(residual.dtype))


class MegaStepper(BlockStepper):
    """A layer that decodes."""

    def __init__(self, block: Mega, spec: SlotSpec) -> None:
        self.block = block
        self.mixer = mixer_stepper(block.mixer, spec)
        self.attention = activated_stepper(block.attention, spec)
        self.ffn = None if block.ffn is None else block_stepper(block.ffn, spec, Sublayer)

    def parts(self) -> dict[str, Stepper]:
        ffn: dict[str, Stepper] = {} if self.ffn is None else {"ffn": self.ffn}
        return {"mixer": self.mixer, "attention": self.attention, **ffn}

    def read(self, slots: Tensor, position: Tensor) -> MegaState:
        ffn = None if self.ffn is None else self.ffn.read(slots, position)
        attention: Any = self.attention.read(slots, position)
        return MegaState(self.mixer.read(slots, position), attention, ffn)

    def write(self, slots: Tensor, state: Any, position: Tensor) -> None:
        self.mixer.write(slots, state.mixer, position)
        self.attention.write(slots, state.attention, position)
        if self.ffn is not None:
            self.ffn.write(slots, state.ffn, position)

    def step(self, x: Tensor, context: StepContext) -> Stepped:
        block = self.block
        n = normalised(block.norm, x) if block.prenorm else x
        tokens, gates = block.inputs(block.dropout(self.mixer.activated(n, context)), n)
        y = block.updated(x, self.attention.step(tokens, context)[0], gates)
        y = y if block.prenorm else normalised(block.norm, y)
        return Stepped(y if self.ffn is None else self.ffn.step(y, context).x, {})


class MegaAttentionStepper(SingleHeadStepper):
    """Attention of MEGA; takes ``[Z | V]`` as its tokens."""

    def __init__(self, module: SingleHead, spec: SlotSpec) -> None:
        super().__init__(module, spec)
        self.d_out = module.d_v

    def step(self, x: Tensor, active: Tensor, context: StepContext) -> Tensor:
        module = self.module
        z, v = x.split_with_sizes([module.config.d_qk, module.d_v], dim=-1)
        position = context.position if module.config.positions == "rotary" else None
        q, k = queries_and_keys(z, module.gamma, module.beta, position, module.config.rotary_theta)
        return self.attend(q, k, v, None, active, context)
