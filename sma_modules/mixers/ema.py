"""EMA: the multi-dimensional damped moving average as an always-on sequence layer (MEGA, arXiv 2209.10655)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sma.interfaces import Mixer
from sma.ops.row_norm import RowNorm
from sma.state import State
from sma.steppers import MixerStepper, SlotSpec, StepContext
from sma_modules.ops.ema import Activation, EMAState, ema, initial_state
from sma_modules.ops.ema_step import Averages, Coefficients, ema_step


class EMA(Mixer):
    r"""Damped moving average of each channel, causal or in both directions (``causal=False``).

    With n counting the states of a channel:

    .. math::

        p = \sigma(\delta), \quad q = 1 - p\, \sigma(\alpha), \quad S_t = q S_{t-1} + p \beta x_t, \quad
        y_t = \sum_n \frac{\gamma_n}{\sqrt N} S_t[n] + \omega x_t

    On a CUDA device it is a chunked scan, with SiLU and dropout in the same kernel. Elsewhere it is a convolution or
    products of matrices. The page of the operation :func:`~sma_modules.ops.ema.ema` derives how they agree, and how the
    state of a truncated average stays exact.

    Parameters are those of :func:`sma_modules.ops.ema.ema`: ``delta``, ``alpha``, ``beta (D, N, 1)``, ``gamma (D, N)``
    and ``omega (D,)``; bidirectional ones have 2 D rows, the second D for the direction right to left.

    Example:
        >>> mixer = EMA.Config(n_state=4).build(d_model=8, causal=True)
        >>> x = torch.randn(2, 5, 8)
        >>> y, _ = mixer(x)
        >>> head, state = mixer(x[:, :3], mixer.initial_state(2, x))
        >>> tail, state = mixer(x[:, 3:], state)
        >>> torch.allclose(torch.cat([head, tail], dim=1), y, atol=1e-5)
        True
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(Mixer.Config):
        """Options.

        Attributes:
            n_state: moving averages N per channel.
            truncation: how many tokens back (the present one included) the average reaches; None for no bound.
        """

        n_state: int = 16
        truncation: int | None = None

        def __post_init__(self) -> None:
            self.require(self.n_state >= 1, "n_state", "must be at least 1")
            self.require(self.truncation is None or self.truncation >= 1, "truncation", "must be None or at least 1")

    config: Config

    def __init__(self, config: Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.streams = causal
        rows = d_model if causal else 2 * d_model
        self.delta = nn.Parameter(torch.empty(rows, config.n_state, 1))
        self.alpha = nn.Parameter(torch.empty(rows, config.n_state, 1))
        self.beta = nn.Parameter(torch.empty(rows, config.n_state, 1))
        self.gamma = nn.Parameter(torch.empty(rows, config.n_state))
        self.omega = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation; normal distributions are cut off at two standard deviations."""
        for parameter, std in (
            (self.delta, 0.2),
            (self.alpha, 0.2),
            (self.beta, 0.02),
            (self.gamma, 1.0),
            (self.omega, 1.0),
        ):
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        with torch.no_grad():  # alternating signs: neighbouring states begin as differences, not as copies
            self.beta[:, 0::2] += 1
            self.beta[:, 1::2] -= 1

    def forward(
        self, x: Tensor, state: EMAState | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, EMAState | None]:
        """``x (B, L, D)`` to ``y (B, L, D)``, and the stream's state to the one after each row's last real token.

        Without a state the rows are whole sequences, and None is returned for it: that is the fastest.

        Raises:
            ShapeError: ``x`` or ``lengths`` has the wrong shape or dtype.
            StreamingError: a state was given to a bidirectional average or does not fit.
        """
        return self._average(x, state, lengths, "none", 0.0)

    def activated(
        self, x: Tensor, state: EMAState | None = None, *, lengths: Tensor | None = None, dropout: float = 0.0
    ) -> tuple[Tensor, EMAState | None]:
        """``dropout(silu(y))`` and the state, in one operation; see :meth:`forward`."""
        return self._average(x, state, lengths, "silu", dropout)

    def stepper(self, spec: SlotSpec) -> EMAStepper:
        return EMAStepper(self, spec)

    def _average(
        self, x: Tensor, state: EMAState | None, lengths: Tensor | None, activation: Activation, dropout: float
    ) -> tuple[Tensor, EMAState | None]:
        return ema(
            x,
            self.delta,
            self.alpha,
            self.beta,
            self.gamma,
            self.omega,
            bidirectional=not self.causal,
            truncation=self.config.truncation,
            lengths=lengths,
            state=state,
            return_state=state is not None,
            activation=activation,
            dropout=dropout,
        )

    def initial_state(self, batch: int, like: Tensor) -> State | None:
        """State before the first token.

        Raises:
            StreamingError: the average is bidirectional.
        """
        super().initial_state(batch, like)
        return initial_state(batch, self.d_model, self.config.n_state, self.config.truncation, like=like)


class EMAStepper(MixerStepper):
    """The recurrence of an average, with the norm in front and SiLU behind in one pass."""

    def __init__(self, mixer: EMA, spec: SlotSpec) -> None:
        mixer.initial_state(0, spec.like)  # raises if it cannot stream
        self.mixer = mixer
        self.averages = Averages.empty(spec, mixer.d_model, mixer.config.n_state, mixer.config.truncation)
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

    def step(self, x: Tensor, context: StepContext) -> Tensor:
        return ema_step(x, self.averages, self.coefficients, live=context.live, position=context.position)

    def activated(self, x: Tensor, context: StepContext, norm: RowNorm | None = None) -> Tensor:
        return ema_step(
            x,
            self.averages,
            self.coefficients,
            live=context.live,
            position=context.position,
            norm=norm,
            activation="silu",
        )
