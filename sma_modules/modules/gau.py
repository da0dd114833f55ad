"""Gated attention unit over the activated tokens: the module of SeqBoat (arXiv 2306.11197, section 4)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sma.dropout import Dropout
from sma.interfaces import ModuleOutput
from sma.ops.backend import concrete
from sma.routing import Packed
from sma.runtime.plain import DROPOUTS, is_plain, project
from sma.runtime.recomputation import recomputed
from sma.state import State
from sma.steppers import Decision, SlotSpec, StepContext
from sma.working_memory import WorkingMemory
from sma_modules.modules.local_attention import LocalAttention, RingStepper, initialise
from sma_modules.ops.gau_inputs import gau_inputs
from sma_modules.ops.gau_inputs.eager import queries_and_keys
from sma_modules.ops.gau_output import gau_output
from sma_modules.ops.gau_projections import gau_projections
from sma_modules.ops.ring_attention import ring_attention
from sma_modules.ops.window_attention import Bias

_BIAS: dict[str, Bias] = {"simple": "original", "local": "local"}


class SingleHead(LocalAttention):
    """Attention of one head whose queries and keys are two affine maps of one narrow projection ``Z``.

    ``q = Z * gamma[0] + beta[0]``, ``k = Z * gamma[1] + beta[1]``, with positions as configured. The subclass makes
    ``Z`` and the values, and uses the output (MEGA, arXiv 2209.10655, section 3.2).
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(LocalAttention.Config):
        """Options.

        Attributes:
            d_qk: width z of queries and keys.
            d_v: width h of values; None for twice the width of the model.
            activation: from scores to weights.
            positions: "simple" biases by original distance, "local" by distance in the compressed sequence, "rotary"
                turns queries and keys by original position.
            max_positions: size P of the table of "simple"; longer distances use its ends.
        """

        d_qk: int = 64
        d_v: int | None = None
        activation: Literal["softmax", "relu2", "laplace"] = "softmax"
        positions: Literal["none", "simple", "local", "rotary"] = "rotary"
        max_positions: int = 1024

        def __post_init__(self) -> None:
            super().__post_init__()
            rotary, local = self.positions == "rotary", self.positions == "local"
            self.require(self.d_qk >= 1, "d_qk", "must be at least 1")
            self.require(self.d_v is None or self.d_v >= 1, "d_v", "must be at least 1 or null")
            activations, positions = ("softmax", "relu2", "laplace"), ("none", "simple", "local", "rotary")
            self.require(self.activation in activations, "activation", f"must be one of {', '.join(activations)}")
            self.require(self.positions in positions, "positions", f"must be one of {', '.join(positions)}")
            self.require(self.max_positions >= 1, "max_positions", "must be at least 1")
            self.require(not local or self.window is not None, "window", "must be given for positions 'local'")
            self.require(not rotary or self.d_qk % 2 == 0, "d_qk", "must be even for positions 'rotary'")

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.config: SingleHead.Config = config
        self.d_v = 2 * d_model if config.d_v is None else config.d_v
        self.bias: Bias = _BIAS.get(config.positions, "none")
        self.gamma = nn.Parameter(torch.empty(2, config.d_qk))
        self.beta = nn.Parameter(torch.zeros(2, config.d_qk))
        initialise(self.gamma)
        entries = 2 * config.max_positions - 1 if config.positions == "simple" else 0
        if config.positions == "local" and config.window is not None:
            entries = 6 * config.window - 1
        self.position_bias = nn.Parameter(0.02 * torch.randn(entries)) if entries else None

    def initial_state(self, batch: int, like: Tensor) -> State | None:
        """An empty memory; None for a unit that does not stream."""
        return self.empty_memory(batch, like.new_empty(0, 1, self.config.d_qk), like.new_empty(0, 1, self.d_v))

    def attend_shared(
        self, z: Tensor, v: Tensor, packed: Packed, state: State | None
    ) -> tuple[Tensor, WorkingMemory | None]:
        """Attention over values ``v (K, h)`` with queries and keys from ``z (K, d_qk)``: ``(K, h)`` and the memory
        after.
        """
        q, k = queries_and_keys(z, self.gamma, self.beta, self.rotated_by(packed), self.config.rotary_theta)
        return self.attend_single(q, k, v, packed, state)

    def rotated_by(self, packed: Packed) -> Tensor | None:
        """Positions ``(K,)`` that turn queries and keys; None if positions are not rotary."""
        return packed.position if self.config.positions == "rotary" else None

    def attend_single(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, state: State | None, gate: Tensor | None = None
    ) -> tuple[Tensor, WorkingMemory | None]:
        """Attention with queries and keys ``(K, d_qk)``, values and, if any, a gate ``(K, h)``, as
        :meth:`attend_shared`.
        """
        out, memory = self.attend(
            q[:, None],
            k[:, None],
            v[:, None],
            packed,
            state,
            activation=self.config.activation,
            bias=self.bias,
            table=self.position_bias,
            gate=None if gate is None else gate[:, None],
        )
        return out.squeeze(1), memory


class GAU(SingleHead):
    r"""Single-head attention with a window over the compressed sequence, gated element by element.

    With m the tokens::

        [Z | R | V] = SiLU(mx_proj(m));  q = Z * gamma[0] + beta[0];  k = Z * gamma[1] + beta[1]
        y = dropout(h_proj(attention(q, k, V) * R))

    The option ``activation`` turns a score :math:`s = q \cdot k` into a weight:

    - ``softmax``: softmax over the visible keys of :math:`s / \sqrt{z}` + bias.
    - ``relu2``: :math:`\mathrm{relu}(s / w + \mathrm{bias})^2` with w the window, 2 w if not causal, and the number of
      visible keys without a window.
    - ``laplace``: :math:`\frac{1}{2}(1 + \mathrm{erf}((s' - \mu) / (\sigma \sqrt 2)))` with
      :math:`\mu = \sqrt{1/2}`, :math:`\sigma = \sqrt{1/(4 \pi)}` and s' the scaled score as for ``relu2``.

    The option ``positions`` says how positions enter:

    - ``none``: not at all.
    - ``simple``: a table of 2 P - 1 biases by the distance in the input, P = ``max_positions``; longer distances use
      its ends.
    - ``local``: a table of 6 w - 1 biases by the distance in the compressed sequence.
    - ``rotary``: queries and keys are turned by their positions in the input.

    On a CUDA device one kernel makes queries, keys, values and gate, and another applies attention and gate. Scores
    exist a tile at a time. There is no residual inside. For streaming see
    :class:`~sma_modules.modules.local_attention.LocalAttention`.

    Example:
        >>> gau = GAU.Config(d_qk=8, window=4).build(d_model=16, causal=True)
        >>> packed = Packed.from_mask(torch.tensor([[True, False, True]]))
        >>> gau(torch.randn(2, 16), packed).output.shape
        torch.Size([2, 16])
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(SingleHead.Config):
        """Options.

        Attributes:
            hidden_dropout: on the output.
        """

        hidden_dropout: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(0 <= self.hidden_dropout < 1, "hidden_dropout", "must be in [0, 1)")

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.mx_proj = nn.Linear(d_model, config.d_qk + 2 * self.d_v)
        self.h_proj = nn.Linear(self.d_v, d_model)
        initialise(self.mx_proj, self.h_proj)
        self.dropout = Dropout(config.hidden_dropout)

    def stepper(self, spec: SlotSpec) -> GAUStepper:
        return GAUStepper(self, spec)

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
            StreamingError: a state is given to a unit that does not stream, or does not fit.
        """
        self.check(x, packed, state)
        mx, theta, position = project(self.mx_proj, x), self.config.rotary_theta, self.rotated_by(packed)
        run = partial(gau_inputs, gamma=self.gamma, beta=self.beta, position=position, theta=theta)
        inputs = run(mx)
        # They are larger than mx, which is kept anyway. Computing them again is one pass over mx.
        with recomputed(partial(run, mx.detach()), inputs) if mx.is_cuda else nullcontext():
            q, k, v, r = inputs
            out, memory = self.attend_single(q, k, v, packed, state, gate=r)
        del inputs, q, k, v, r
        return ModuleOutput(self.dropout(project(self.h_proj, out)), memory)


class SingleHeadStepper(RingStepper):
    """Attention of one head with the positions of :class:`~sma_modules.modules.gau.SingleHead`."""

    def __init__(self, module: SingleHead, spec: SlotSpec) -> None:
        super().__init__(module, spec, 1, module.config.d_qk, module.d_v)
        self.module = module

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, active: Tensor, context: StepContext
    ) -> Tensor:
        """``(S, h)`` from queries and keys ``(S, z)``, values and, if any, a gate ``(S, h)``."""
        module, config = self.module, self.module.config
        out = ring_attention(
            q[:, None],
            k[:, None],
            v[:, None],
            self.ring,
            active=active,
            live=context.live,
            position=context.position,
            window=module.window,
            chunk=module.chunk,
            activation=config.activation,
            bias=module.bias,
            bias_table=module.position_bias,
            gate=None if gate is None else gate[:, None],
        )
        return out.squeeze(1)


class GAUStepper(SingleHeadStepper):
    """A gated attention unit.

    Attributes:
        is_plain: whether the unit's parts were plain when the stepper was built, so that they need not be called.
    """

    module: GAU

    def __init__(self, module: GAU, spec: SlotSpec) -> None:
        super().__init__(module, spec)
        self.is_plain = is_plain(module.mx_proj) and is_plain(module.h_proj) and is_plain(module.dropout, DROPOUTS)

    def between(
        self, m: Tensor, skip: tuple[Tensor, Tensor], residual: Tensor, decision: Decision, context: StepContext
    ) -> Tensor:
        """``silu(W_skip m + b_skip + confidence * gau(m) + residual)``, the layer of SeqBoat, in few passes.

        Args:
            m: ``(S, D)`` what the unit is activated on.
            skip: weight and bias of the skip path.
            residual: ``(S, D)``.
            decision: which slots are active, of one module.
            context: the position of the slots.
        """
        module, active = self.module, decision.active[:, 0]
        if concrete(active) and not bool(active.any()):
            self.idle(context)
            return F.silu(F.linear(m, *skip) + residual)
        path, q, k, v, r = gau_projections(
            m,
            skip,
            (module.mx_proj.weight, module.mx_proj.bias),
            gamma=module.gamma,
            beta=module.beta,
            active=active,
            position=context.position if module.config.positions == "rotary" else None,
            theta=module.config.rotary_theta,
        )
        attended = self.attend(q, k, v, r, active, context)
        return gau_output(
            attended,
            module.h_proj.weight,
            module.h_proj.bias,
            active=active,
            confidence=decision.confidence[:, 0],
            skip=path,
            residual=residual,
        )

    def step(self, x: Tensor, active: Tensor, context: StepContext) -> Tensor:
        module = self.module
        position = context.position if module.config.positions == "rotary" else None
        inputs = gau_inputs(
            project(module.mx_proj, x), module.gamma, module.beta, position=position, theta=module.config.rotary_theta
        )
        q, k, v, r = inputs
        out: Tensor = module.dropout(project(module.h_proj, self.attend(q, k, v, r, active, context)))
        return out
