"""The SeqBoat layer (arXiv 2306.11197, section 4): an always-on EMA, and a gated attention unit on the tokens that
ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sma.activated import ActivatedState
from sma.decode.choice import mixer_stepper
from sma.interfaces import Block, BlockOutput, Mixer, Norm
from sma.layer import ActivatedConfig, init_router
from sma.ops.combine import combine
from sma.routing import Routing
from sma.runtime.onednn import linear
from sma.state import State
from sma.steppers import BlockStepper, SlotSpec, StepContext, Stepped, Stepper, normalised
from sma_modules.mixers.ema import EMA
from sma_modules.modules.gau import GAU, GAUStepper
from sma_modules.norms import LayerNorm


@dataclass(frozen=True)
class SeqBoatState(State):
    """The state of the mixer and of the activated module."""

    mixer: State | None
    activate: ActivatedState


class SeqBoat(Block):
    """``m = SiLU(mixer(norm(x))); [u | s] = W m; y = SiLU(s + c * f(compress(m)) + x)``.

    The logits ``u`` and the skip path ``s`` come from one projection (``hx_proj`` of the published code). Dropout acts
    on ``m``, and on the module's output (bidirectional) or on the sum of skip and module (causal).
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(Block.Config):
        mixer: Mixer.Config = field(default_factory=EMA.Config)
        activate: ActivatedConfig = field(default_factory=lambda: ActivatedConfig(module=GAU.Config()))
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
        self.activate = config.activate.build(d_model=d_model, causal=causal, router=False)
        configurator = self.activate.configurator
        self.n_logits = configurator.n_modules * configurator.logits_per_module
        self.skip_proj = nn.Linear(d_model, self.n_logits + d_model)
        init_router(self.skip_proj)
        self.dropout = nn.Dropout(config.dropout)

    def initial_state(self, batch: int, like: Tensor) -> SeqBoatState:
        return SeqBoatState(self.mixer.initial_state(batch, like), self.activate.initial_state(batch, like))

    def stepper(self, spec: SlotSpec) -> SeqBoatStepper:
        return SeqBoatStepper(self, spec)

    def projections(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weight and bias of the router, and of the skip path."""
        sizes = (self.n_logits, self.d_model)
        (router, skip), (router_bias, skip_bias) = (
            each.split_with_sizes(sizes) for each in (self.skip_proj.weight, self.skip_proj.bias)
        )
        return (router, router_bias), (skip, skip_bias)

    def forward(
        self,
        x: Tensor,
        state: SeqBoatState | None = None,
        *,
        lengths: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> BlockOutput:
        """One layer; see :class:`sma.interfaces.Block`."""
        residual = x
        if self.prenorm:
            x = self.norm(x, lengths=lengths)
        dropout = self.dropout.p if self.training else 0.0
        m, mixer_state = self.mixer.activated(x, state.mixer if state else None, lengths=lengths, dropout=dropout)
        router, (skip_weight, skip_bias) = self.projections()
        parts = self.activate.parts(
            m,
            state.activate if state else None,
            lengths=lengths,
            router=router if self.n_logits else None,
            replay=replay.get("activate") if replay else None,
        )
        norm = None if self.prenorm else self.norm.row_norm()
        (member,) = parts.members
        y = combine(
            member.output,
            member.packed,
            weight=member.weight,
            skip=linear(parts.x, skip_weight, None if m.is_cuda else skip_bias),
            # A kernel sums its gradient on the way; elsewhere the product adds it for nothing.
            skip_bias=skip_bias if m.is_cuda else None,
            residual=residual,
            activation="silu",
            norm=norm,
            dropout=dropout,
            drop_sum=self.causal,
        )
        if not self.prenorm and norm is None:
            y = self.norm(y, lengths=lengths)
        after = None if parts.state is None else SeqBoatState(mixer_state, parts.state)
        losses = {f"activate.{name}": loss for name, loss in parts.losses.items()}
        return BlockOutput(y, after, {"activate": parts.routing}, losses)


class SeqBoatStepper(BlockStepper):
    """A layer that decodes: average, projections, module and their sum."""

    def __init__(self, block: SeqBoat, spec: SlotSpec) -> None:
        self.block = block
        self.mixer = mixer_stepper(block.mixer, spec)
        self.activate = block.activate.stepper(spec)

    def parts(self) -> dict[str, Stepper]:
        return {"mixer": self.mixer, "activate": self.activate}

    def read(self, slots: Tensor, position: Tensor) -> SeqBoatState:
        return SeqBoatState(self.mixer.read(slots, position), self.activate.read(slots, position))

    def write(self, slots: Tensor, state: Any, position: Tensor) -> None:
        self.mixer.write(slots, state.mixer, position)
        self.activate.write(slots, state.activate, position)

    def step(self, x: Tensor, context: StepContext) -> Stepped:
        block = self.block
        norm = block.norm.row_norm()
        if block.prenorm and norm is not None:
            m = self.mixer.activated(x, context, norm)
        else:
            m = self.mixer.activated(normalised(block.norm, x) if block.prenorm else x, context)
        router, skip = block.projections()
        decision = self.activate.decide(m, context, router if block.n_logits else None)
        (member,) = self.activate.members
        if isinstance(member, GAUStepper) and member.is_plain:
            y = member.between(m, skip, x, decision, context)
        else:
            (output,) = self.activate.outputs(m, decision, context)
            y = combine(
                m if output is None else output,
                self.activate.packed(decision.active[:, 0]),
                weight=decision.confidence,
                skip=linear(m, *skip)[:, None],
                residual=x[:, None],
                activation="silu",
            ).squeeze(1)
        return Stepped(y if block.prenorm else normalised(block.norm, y), {"activate": decision})
