"""The SeqBoat layer (arXiv 2306.11197, section 4): an EMA, and a gated attention unit for active tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sma.activated import Activated, ActivatedState
from sma.decision import LogitSource, Weights
from sma.decode.choice import activated_stepper, mixer_stepper
from sma.decode.mixture import MixtureStepper
from sma.interfaces import Block, BlockOutput, Mixer, Norm, activated_by
from sma.layer import ActivatedConfig, SparselyActivated, init_router
from sma.ops.combine import combine
from sma.routing import Routing
from sma.runtime.onednn import linear
from sma.runtime.plain import DROPOUTS, is_plain
from sma.state import State
from sma.steppers import BlockStepper, Decision, SlotSpec, StepContext, Stepped, Stepper, normalised
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

    def projections(self) -> tuple[Weights | None, Weights]:
        """Weight and bias of the router, if it needs one, and of the skip path; only of a plain ``skip_proj``."""
        sizes = (self.n_logits, self.d_model)
        router, skip = self.skip_proj.weight.split_with_sizes(sizes)
        router_bias, skip_bias = self.skip_proj.bias.split_with_sizes(sizes)
        return (router, router_bias) if self.n_logits else None, (skip, skip_bias)

    def projected(self, m: Tensor) -> tuple[Tensor | None, Tensor]:
        """Logits, if any are needed, and skip path of ``m (..., D)``, by calling ``skip_proj``."""
        logits, skip = self.skip_proj(m).split_with_sizes((self.n_logits, self.d_model), -1)
        return logits if self.n_logits else None, skip

    def forward(
        self,
        x: Tensor,
        state: SeqBoatState | None = None,
        *,
        lengths: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> BlockOutput:
        """One layer; see :class:`sma.interfaces.Block`."""
        n = self.norm(x, lengths=lengths) if self.prenorm else x
        before = None if state is None else state.mixer
        m, mixer_state = activated_by(self.mixer, n, before, lengths, self.dropout)
        replayed = None if replay is None else replay.get("activate")
        after = None if state is None else state.activate
        if is_plain(self.activate, SparselyActivated) and is_plain(self.dropout, DROPOUTS):
            y, after, routing, losses = self._fused(m, x, after, lengths, replayed)
        else:
            y, after, routing, losses = self._called(m, x, after, lengths, replayed)
        if losses:
            losses = {f"activate.{name}": loss for name, loss in losses.items()}
        return BlockOutput(
            y, None if after is None else SeqBoatState(mixer_state, after), {"activate": routing}, losses
        )

    def _fused(
        self, m: Tensor, x: Tensor, state: ActivatedState | None, lengths: Tensor | None, replay: Routing | None
    ) -> Activated:
        """What follows ``m``, in few passes over memory."""
        if is_plain(self.skip_proj):
            router, (weight, bias) = self.projections()
            out = self.activate.run_members(
                m, state, lengths=lengths, source=LogitSource(weights=router), replay=replay
            )
            # A kernel sums the gradient of the bias on the way; elsewhere the product adds it for nothing.
            skip, skip_bias = linear(out.x, weight, None if m.is_cuda else bias), bias if m.is_cuda else None
        else:
            logits, skip = self.projected(m)
            out = self.activate.run_members(m, state, lengths=lengths, source=LogitSource(logits=logits), replay=replay)
            skip_bias = None
        norm = self.norm.row_norm() if not self.prenorm and is_plain(self.norm, Norm) else None
        (member,) = out.members
        y = combine(
            member.output,
            member.packed,
            weight=member.weight,
            skip=skip,
            skip_bias=skip_bias,
            residual=x,
            activation="silu",
            norm=norm,
            dropout=self.dropout.p if self.training else 0.0,
            drop_sum=self.causal,
        )
        if not self.prenorm and norm is None:
            y = self.norm(y, lengths=lengths)
        return Activated(y, out.state, out.routing, out.losses)

    def _called(
        self, m: Tensor, x: Tensor, state: ActivatedState | None, lengths: Tensor | None, replay: Routing | None
    ) -> Activated:
        """The same, by calling every part."""
        logits, skip = self.projected(m)
        out = self.activate(m, state, lengths=lengths, logits=logits, replay=replay)
        y = self.dropout(skip + out.output) if self.causal else skip + self.dropout(out.output)
        y = F.silu(y + x).to(x.dtype)
        return Activated(y if self.prenorm else self.norm(y, lengths=lengths), out.state, out.routing, out.losses)


class SeqBoatStepper(BlockStepper):
    """A layer that decodes: average, projections, module and their sum.

    The parts that were plain when the stepper was built are not called.
    """

    def __init__(self, block: SeqBoat, spec: SlotSpec) -> None:
        self.block = block
        self.mixer = mixer_stepper(block.mixer, spec)
        self.activate = activated_stepper(block.activate, spec)
        self.norm_is_plain = is_plain(block.norm, Norm)
        self.is_plain = is_plain(block.skip_proj) and is_plain(block.dropout, DROPOUTS)

    def parts(self) -> dict[str, Stepper]:
        return {"mixer": self.mixer, "activate": self.activate}

    def read(self, slots: Tensor, position: Tensor) -> SeqBoatState:
        activate: Any = self.activate.read(slots, position)
        return SeqBoatState(self.mixer.read(slots, position), activate)

    def write(self, slots: Tensor, state: Any, position: Tensor) -> None:
        self.mixer.write(slots, state.mixer, position)
        self.activate.write(slots, state.activate, position)

    def step(self, x: Tensor, context: StepContext) -> Stepped:
        block = self.block
        norm = block.norm.row_norm() if block.prenorm and self.norm_is_plain else None
        if norm is not None:
            m = self.mixer.activated(x, context, norm)
        else:
            m = self.mixer.activated(normalised(block.norm, x) if block.prenorm else x, context)
        if self.is_plain and isinstance(self.activate, MixtureStepper):
            y, decision = self._fused(self.activate, m, x, context)
        else:
            m = block.dropout(m)
            logits, skip = block.projected(m)
            output, decision = self.activate.step(m, context, logits)
            y = F.silu(block.dropout(skip + output) + x) if block.causal else F.silu(skip + block.dropout(output) + x)
        return Stepped(y if block.prenorm else normalised(block.norm, y), {"activate": decision})

    def _fused(self, activate: MixtureStepper, m: Tensor, x: Tensor, context: StepContext) -> tuple[Tensor, Decision]:
        """What follows ``m``, in few passes over memory."""
        router, skip = self.block.projections()
        decision = activate.decide(m, context, router)
        (member,) = activate.members
        if isinstance(member, GAUStepper) and member.is_plain:
            return member.between(m, skip, x, decision, context), decision
        (output,) = activate.outputs(m, decision, context)
        y = combine(
            m if output is None else output,
            activate.packed(decision.active[:, 0]),
            weight=decision.confidence,
            skip=linear(m, *skip)[:, None],
            residual=x[:, None],
            activation="silu",
        )
        return y.squeeze(1), decision
