"""The shipped mixers and modules, one token at a time; see :mod:`sma.stepping`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from sma.errors import StreamingError
from sma.ops.backend import concrete
from sma.ops.row_norm import RowNorm
from sma.state import State
from sma.stepping import Decision, MixerStepper, ModuleStepper, Moment, Room, Stepper
from sma_modules.ffn import is_plain
from sma_modules.ops.ema_step import Averages, Coefficients, ema_step
from sma_modules.ops.gau_inputs import gau_inputs
from sma_modules.ops.gau_inputs.eager import queries_and_keys
from sma_modules.ops.gau_output import gau_output
from sma_modules.ops.gau_projections import gau_projections
from sma_modules.ops.ring_attention import Ring, ring_attention
from sma_modules.ops.rotary import rotary

if TYPE_CHECKING:
    from sma_modules.attention import Attention, AttentionMixer
    from sma_modules.ema import EMA
    from sma_modules.gau import GAU, SingleHead
    from sma_modules.local_attention import LocalAttention


class EMAStepper(MixerStepper):
    """The recurrence of an average, with the norm in front and SiLU behind in one pass."""

    def __init__(self, mixer: EMA, room: Room) -> None:
        mixer.initial_state(0, room.like)  # says why it cannot stream, if so
        self.mixer = mixer
        self.averages = Averages.empty(room, mixer.d_model, mixer.config.n_state, mixer.config.truncation)
        self.coefficients = self._derived()

    def _derived(self) -> Coefficients:
        mixer = self.mixer
        parameters = (mixer.delta[..., 0], mixer.alpha[..., 0], mixer.beta[..., 0], mixer.gamma)
        return Coefficients.of(parameters, mixer.omega, mixer.config.truncation)

    def refresh(self) -> None:
        self.coefficients.copy_(self._derived())

    def memory(self) -> tuple[Tensor, ...]:
        return self.averages.tensors()

    def read(self, slots: Tensor, position: Tensor) -> State:
        return self.averages.read(slots, position)

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        self.averages.write(slots, state, position)

    def step(self, x: Tensor, moment: Moment) -> Tensor:
        return ema_step(x, self.averages, self.coefficients, live=moment.live, position=moment.position)

    def activated(self, x: Tensor, moment: Moment, norm: RowNorm | None = None) -> Tensor:
        return ema_step(
            x,
            self.averages,
            self.coefficients,
            live=moment.live,
            position=moment.position,
            norm=norm,
            activation="silu",
        )


class RingStepper(ModuleStepper):
    """What modules that attend to their working memory have in common: a ring."""

    def __init__(self, module: LocalAttention, room: Room, heads: int, d_key: int, d_value: int) -> None:
        reach = module.attention_window()
        if not module.streams or reach is None:
            bound = "has no bounded memory" if module.causal else "looks ahead"
            raise StreamingError(f"{type(module).__name__}: cannot stream: it {bound}")
        self.ring = Ring.empty(room, reach, heads, d_key, d_value)
        self.d_out = module.d_model

    def memory(self) -> tuple[Tensor, ...]:
        return self.ring.tensors()

    def read(self, slots: Tensor, position: Tensor) -> State:
        return self.ring.read(slots, position)

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        self.ring.write(slots, state, position)

    def idle(self, moment: Moment) -> None:
        self.ring.advance(moment.live, moment.position, self.ring.count(moment.position))


class SingleHeadStepper(RingStepper):
    """Attention of one head with the positions of :class:`~sma_modules.gau.SingleHead`."""

    def __init__(self, module: SingleHead, room: Room) -> None:
        super().__init__(module, room, 1, module.config.d_qk, module.d_v)
        self.module = module

    def attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, active: Tensor, moment: Moment) -> Tensor:
        """``(S, h)`` from queries and keys ``(S, z)``, values and, if any, a gate ``(S, h)``."""
        module, config = self.module, self.module.config
        out = ring_attention(
            q[:, None],
            k[:, None],
            v[:, None],
            self.ring,
            active=active,
            live=moment.live,
            position=moment.position,
            window=module.window,
            chunk=module.chunk,
            activation=config.activation,
            bias=module.bias,
            bias_table=module.position_bias,
            gate=None if gate is None else gate[:, None],
        )
        return out.squeeze(1)


class GAUStepper(SingleHeadStepper):
    """A gated attention unit."""

    module: GAU

    @property
    def is_plain(self) -> bool:
        """Whether the unit's projections are nothing but their weights."""
        return is_plain(self.module.mx_proj) and is_plain(self.module.h_proj)

    def between(
        self, m: Tensor, skip: tuple[Tensor, Tensor], residual: Tensor, decision: Decision, moment: Moment
    ) -> Tensor:
        """``silu(W_skip m + b_skip + confidence * gau(m) + residual)``, the layer of SeqBoat, in few passes.

        Args:
            m: ``(S, D)`` what the unit is activated on.
            skip: weight and bias of the skip path.
            residual: ``(S, D)``.
            decision: who is active, of one module.
            moment: where the slots stand.
        """
        module, active = self.module, decision.active[:, 0]
        if concrete(active) and not bool(active.any()):
            self.idle(moment)
            return F.silu(F.linear(m, *skip) + residual)
        path, q, k, v, r = gau_projections(
            m,
            skip,
            (module.mx_proj.weight, module.mx_proj.bias),
            gamma=module.gamma,
            beta=module.beta,
            active=active,
            position=moment.position if module.config.positions == "rotary" else None,
            theta=module.config.rotary_theta,
        )
        attended = self.attend(q, k, v, r, active, moment)
        return gau_output(
            attended,
            module.h_proj.weight,
            module.h_proj.bias,
            active=active,
            confidence=decision.confidence[:, 0],
            skip=path,
            residual=residual,
        )

    def step(self, x: Tensor, active: Tensor, moment: Moment) -> Tensor:
        module = self.module
        position = moment.position if module.config.positions == "rotary" else None
        inputs = gau_inputs(
            module.mx_proj(x), module.gamma, module.beta, position=position, theta=module.config.rotary_theta
        )
        q, k, v, r = inputs
        out: Tensor = module.h_proj(self.attend(q, k, v, r, active, moment))
        return out


class SharedStepper(SingleHeadStepper):
    """Takes ``[Z | V]`` as its tokens: the attention of MEGA."""

    def __init__(self, module: SingleHead, room: Room) -> None:
        super().__init__(module, room)
        self.d_out = module.d_v

    def step(self, x: Tensor, active: Tensor, moment: Moment) -> Tensor:
        module = self.module
        z, v = x.split_with_sizes([module.config.d_qk, module.d_v], dim=-1)
        position = moment.position if module.config.positions == "rotary" else None
        q, k = queries_and_keys(z, module.gamma, module.beta, position, module.config.rotary_theta)
        return self.attend(q, k, v, None, active, moment)


class AttentionStepper(RingStepper):
    """Multi-head attention."""

    def __init__(self, module: Attention, room: Room) -> None:
        super().__init__(module, room, module.n_kv_heads, module.width, module.width)
        self.module = module

    def step(self, x: Tensor, active: Tensor, moment: Moment) -> Tensor:
        return self.at(x, active, moment, moment.position)

    def at(self, x: Tensor, active: Tensor, moment: Moment, position: Tensor) -> Tensor:
        """The same, with the original positions ``(S,)`` of the tokens."""
        module, heads, groups = self.module, self.module.config.n_heads, self.module.n_kv_heads
        qkv = module.qkv_proj(x).view(-1, heads + 2 * groups, module.width)
        qk, v = qkv.split([heads + groups, groups], dim=1)
        if module.config.positions == "rotary":
            qk = rotary(qk, position, module.config.rotary_theta)
        q, k = qk.split([heads, groups], dim=1)
        out = ring_attention(
            q,
            k,
            v,
            self.ring,
            active=active,
            live=moment.live,
            position=moment.position,
            at=position,
            window=module.window,
            chunk=module.chunk,
        )
        projected: Tensor = module.out_proj(out.flatten(1))
        return projected


class AttentionMixerStepper(MixerStepper):
    """Multi-head attention of every token. Its memory counts them, and so knows the position."""

    def __init__(self, mixer: AttentionMixer, room: Room) -> None:
        mixer.initial_state(0, room.like)  # says why it cannot stream, if so
        self.inner = AttentionStepper(mixer.attention, room)

    def parts(self) -> dict[str, Stepper]:
        return {"attention": self.inner}

    def read(self, slots: Tensor, position: Tensor) -> State:
        return self.inner.read(slots, position)

    def write(self, slots: Tensor, state: State | None, position: Tensor) -> None:
        self.inner.write(slots, state, position)

    def step(self, x: Tensor, moment: Moment) -> Tensor:
        return self.inner.at(x, moment.live, moment, self.inner.ring.count(moment.position))
