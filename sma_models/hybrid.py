"""A general residual block: any mixers and modules, always on or sparsely activated, in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sma.configurable import BaseConfig
from sma.configurators import Always
from sma.decode.choice import activated_stepper, block_stepper, mixer_stepper
from sma.dropout import Dropout
from sma.interfaces import Block, BlockOutput, Mixer, Module, Norm
from sma.layer import ActivatedConfig, MixtureConfig, SparselyActivated
from sma.routing import Routing
from sma.state import State
from sma.steppers import ActivatedStepper, BlockStepper, Decision, SlotSpec, StepContext, Stepped, Stepper, normalised
from sma_modules.norms import LayerNorm

ROLES = ("mixer", "module", "activate", "mixture")


def always_on(module: Module, *, causal: bool) -> SparselyActivated:
    """A module that every real token goes through."""
    return SparselyActivated(module, Always(Always.Config()), d_model=module.d_model, causal=causal, router=False)


@dataclass(kw_only=True, frozen=True)
class SublayerConfig(BaseConfig):
    """One residual step ``x + dropout(f(norm(x)))``, where f is exactly one of the four.

    Attributes:
        mixer: an always-on sequence layer.
        module: an activatable module, run on every token.
        activate: a sparsely activated module.
        mixture: several modules under one configurator.
        norm: normalisation in front (``prenorm`` of the block) or behind.
        dropout: on the output, before the residual is added.
        residual: False replaces x instead of adding to it.
    """

    mixer: Mixer.Config | None = None
    module: Module.Config | None = None
    activate: ActivatedConfig | None = None
    mixture: MixtureConfig | None = None
    norm: Norm.Config | None = field(default_factory=LayerNorm.Config)
    dropout: float = 0.0
    residual: bool = True

    def __post_init__(self) -> None:
        given = [role for role in ROLES if getattr(self, role) is not None]
        self.require(
            len(given) == 1, given[1] if len(given) > 1 else "mixer", f"exactly one of {', '.join(ROLES)} must be given"
        )
        self.require(0 <= self.dropout < 1, "dropout", "must lie in [0, 1)")

    @property
    def role(self) -> str:
        """The name of the one of the four that is set."""
        return next(role for role in ROLES if getattr(self, role) is not None)

    def build(self, *, d_model: int, causal: bool = False, prenorm: bool = True) -> Sublayer:  # type: ignore[override]  # says what it needs
        """Construct the sublayer for tokens of width ``d_model``."""
        return Sublayer(self, d_model=d_model, causal=causal, prenorm=prenorm)


class Sublayer(nn.Module):
    """One residual step of a hybrid block.

    The submodule is called by its role, so the state dict reads like the spec.
    """

    def __init__(self, config: SublayerConfig, *, d_model: int, causal: bool, prenorm: bool) -> None:
        super().__init__()
        self.role = config.role
        self.prenorm = prenorm
        self.residual = config.residual
        self.norm = config.norm.build(d_model=d_model) if config.norm else None
        if self.role == "module":
            assert config.module is not None
            self.module = always_on(config.module.build(d_model=d_model, causal=causal), causal=causal)
        else:
            setattr(self, self.role, getattr(config, self.role).build(d_model=d_model, causal=causal))
        self.dropout = Dropout(config.dropout)

    def initial_state(self, batch: int, like: Tensor) -> State | None:
        """State before the first token."""
        state: State | None = getattr(self, self.role).initial_state(batch, like)
        return state

    def stepper(self, spec: SlotSpec) -> SublayerStepper:
        """What decodes with this sublayer's weights."""
        return SublayerStepper(self, spec)

    def forward(
        self, x: Tensor, state: Any = None, *, lengths: Tensor | None = None, replay: Routing | None = None
    ) -> BlockOutput:
        """``x (B, L, D)``, right-padded; the routing is named by the role."""
        y = self.norm(x, lengths=lengths) if self.norm is not None and self.prenorm else x
        routings: dict[str, Routing] = {}
        losses: dict[str, Tensor] = {}
        inner = getattr(self, self.role)
        if self.role == "mixer":
            y, state = inner(y, state, lengths=lengths)
        else:
            y, state, routing, losses = inner(y, state, lengths=lengths, replay=replay)
            if self.role != "module":
                routings[self.role] = routing
        y = self.dropout(y)
        y = x + y if self.residual else y
        if self.norm is not None and not self.prenorm:
            y = self.norm(y, lengths=lengths)
        return BlockOutput(y, state, routings, {f"{self.role}.{name}": loss for name, loss in losses.items()})


class SublayerStepper(BlockStepper):
    """One residual step that decodes."""

    def __init__(self, sublayer: Sublayer, spec: SlotSpec) -> None:
        self.sublayer = sublayer
        inner = getattr(sublayer, sublayer.role)
        self.inner = mixer_stepper(inner, spec) if sublayer.role == "mixer" else activated_stepper(inner, spec)

    def parts(self) -> dict[str, Stepper]:
        return {self.sublayer.role: self.inner}

    def read(self, slots: Tensor, position: Tensor) -> State | None:
        state: State | None = self.inner.read(slots, position)
        return state

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        self.inner.write(slots, state, position)

    def step(self, x: Tensor, context: StepContext) -> Stepped:
        sublayer = self.sublayer
        y = normalised(sublayer.norm, x) if sublayer.prenorm else x
        decisions: dict[str, Decision] = {}
        if isinstance(self.inner, ActivatedStepper):
            y, decision = self.inner.step(y, context)
            if sublayer.role != "module":
                decisions[sublayer.role] = decision
        else:
            y = self.inner.step(y, context)
        y = sublayer.dropout(y)
        y = x + y if sublayer.residual else y
        return Stepped(y if sublayer.prenorm else normalised(sublayer.norm, y), decisions)


@dataclass(frozen=True)
class HybridState(State):
    """The state of each sublayer."""

    sublayers: tuple[State | None, ...]


class Hybrid(Block):
    """Sublayers one after the other, each with its own norm and residual.

    A Transformer is ``[module: attention, module: ffn]``; a mixture-of-depths Transformer activates the second; an EMA
    hybrid with three sparse modules is ``[mixer: ema, activate: gau, activate: ffn, activate: moe]``.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(Block.Config):
        sublayers: tuple[SublayerConfig, ...]
        prenorm: bool = True

        def __post_init__(self) -> None:
            self.require(len(self.sublayers) > 0, "sublayers", "must not be empty")

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.sublayers = nn.ModuleList(
            sublayer.build(d_model=d_model, causal=causal, prenorm=config.prenorm) for sublayer in config.sublayers
        )

    def initial_state(self, batch: int, like: Tensor) -> HybridState:
        return HybridState(tuple(sublayer.initial_state(batch, like) for sublayer in self.sublayers))  # type: ignore[operator]

    def stepper(self, spec: SlotSpec) -> HybridStepper:
        return HybridStepper(self, spec)

    def forward(
        self,
        x: Tensor,
        state: HybridState | None = None,
        *,
        lengths: Tensor | None = None,
        replay: Mapping[str, Routing] | None = None,
    ) -> BlockOutput:
        """One block; routings are named ``sublayers.<i>.<role>``. See :class:`sma.interfaces.Block`."""
        states: list[State | None] = []
        routings: dict[str, Routing] = {}
        losses: dict[str, Tensor] = {}
        for i, sublayer in enumerate(self.sublayers):
            name = f"sublayers.{i}.{sublayer.role}"
            before, own = state.sublayers[i] if state else None, replay.get(name) if replay else None
            out = sublayer(x, before, lengths=lengths, replay=own)
            x = out.x
            states.append(out.state)
            routings.update({f"sublayers.{i}.{key}": routing for key, routing in out.routings.items()})
            losses.update({f"sublayers.{i}.{key}": loss for key, loss in out.losses.items()})
        return BlockOutput(x, None if state is None else HybridState(tuple(states)), routings, losses)


class HybridStepper(BlockStepper):
    """A block that decodes: its sublayers, one after the other."""

    def __init__(self, block: Hybrid, spec: SlotSpec) -> None:
        self.sublayers = [block_stepper(sublayer, spec, Sublayer) for sublayer in block.sublayers]

    def parts(self) -> dict[str, Stepper]:
        return {f"sublayers.{i}": sublayer for i, sublayer in enumerate(self.sublayers)}

    def read(self, slots: Tensor, position: Tensor) -> HybridState:
        return HybridState(tuple(sublayer.read(slots, position) for sublayer in self.sublayers))

    def write(self, slots: Tensor, state: Any, position: Tensor) -> None:
        for sublayer, own in zip(self.sublayers, state.sublayers, strict=True):
            sublayer.write(slots, own, position)

    def step(self, x: Tensor, context: StepContext) -> Stepped:
        decisions: dict[str, Decision] = {}
        for i, sublayer in enumerate(self.sublayers):
            x, own = sublayer.step(x, context)
            decisions.update({f"sublayers.{i}.{name}": decision for name, decision in own.items()})
        return Stepped(x, decisions)
