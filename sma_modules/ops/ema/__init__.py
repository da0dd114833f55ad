"""ema: the multi-dimensional damped exponential moving average of MEGA (arXiv 2209.10655, section 3.1).

Per channel d and state n, with ``p = sigmoid(delta)`` and ``q = 1 - p * sigmoid(alpha)``::

    S_t = q * S_{t-1} + p * beta * x_t
    y_t = sum_n gamma[n] / sqrt(N) * S_t[n] + omega * x_t

which is a convolution with ``k[j] = sum_n gamma / sqrt(N) * p * beta * q^j``. With ``truncation=K`` the kernel ends
after K taps. README.md derives how the convolution, the recurrence, the bounded window and the chunked scan agree.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ConfigError, ShapeError, StreamingError
from sma.ops.backend import Op, forced_backend, without_autocast
from sma.ops.kernel import FLOATS, why_not_triton_on
from sma_modules.ops.ema.state import EMAState, compute_dtype, initial_state, with_history_of

__all__ = ["OP", "Activation", "EMAState", "compute_dtype", "ema", "initial_state"]

Activation = Literal["none", "silu"]
OP = Op("ema")
STEP_LENGTH = 16
"""Up to this many tokens the recurrence is faster than setting up anything else."""
MAXIMUM_STATES = 16
"""More than these of one channel do not fit into the registers of a thread."""


def ema(
    x: Float[Tensor, "batch length dim"],
    delta: Float[Tensor, "rows state 1"],
    alpha: Float[Tensor, "rows state 1"],
    beta: Float[Tensor, "rows state 1"],
    gamma: Float[Tensor, "rows state"],
    omega: Float[Tensor, " dim"],
    *,
    bidirectional: bool,
    truncation: int | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
    state: EMAState | None = None,
    return_state: bool = False,
    activation: Activation = "none",
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "batch length dim"], EMAState | None]:
    """Damped moving average of each channel, in float32 (float64 for float64 inputs) whatever the parameters' dtype.

    ``y = dropout(activation(average + omega * x))``, rounded to the dtype of ``x`` once, at the end.

    Args:
        x: ``(B, L, D)``, right-padded; any L including 0.
        delta: ``(D, N, 1)``, or ``(2 D, N, 1)`` when bidirectional (rows D.. run right to left); logit of damping p.
        alpha: as ``delta``; logit of the decay.
        beta: as ``delta``; input weights.
        gamma: ``(D, N)`` or ``(2 D, N)``; output weights.
        omega: ``(D,)``; weight of the direct path ``omega * x``, which also runs at padding.
        bidirectional: add a second average that runs from the end of each sequence to its beginning.
        truncation: number of kernel taps K at least 1, in tokens; None for no bound.
        lengths: ``(B,)`` integers in 0..L, the real tokens of each row; None when all are. To the average, padding
            is zero.
        state: what the stream left behind; None at its beginning. Causal only.
        return_state: also return the state after the last real token of each row. Causal only.
        activation: what the average and the direct path go through: ``"silu"`` or ``"none"``.
        dropout: probability, 0 up to but not 1, with which an output becomes zero; 0 when not training.

    Returns:
        ``y (B, L, D)`` in the dtype of ``x``, and the state or None. At padded positions y carries no meaning.

    Raises:
        ShapeError: sizes, dtypes or lengths do not fit.
        ConfigError: ``truncation`` is below 1, ``dropout`` outside its range or the activation unknown.
        StreamingError: a state is given to, or asked from, a bidirectional average, or it was made for other sizes.

    Example:
        >>> zeros, ones = torch.zeros(1, 1, 1), torch.ones(1, 1)
        >>> x = torch.tensor([[[1.0], [0.0], [0.0]]])
        >>> y, _ = ema(x, zeros, zeros, zeros + 2, ones, torch.zeros(1), bidirectional=False)   # p = 1/2, q = 3/4
        >>> [round(v, 4) for v in y.flatten().tolist()]
        [1.0, 0.75, 0.5625]
    """
    _check_shapes(x, delta, alpha, beta, gamma, omega, bidirectional)
    if truncation is not None and truncation < 1:
        raise ConfigError(f"ema: truncation must be None or at least 1, got {truncation}")
    if activation not in get_args(Activation):
        raise ConfigError(f"ema: activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"ema: dropout must be at least 0 and below 1, got {dropout}")
    _check_lengths(x, lengths)
    _check_state(x, gamma.shape[1], bidirectional, truncation, state, return_state)
    # Not [..., 0], whose gradient is a tensor of zeros into which it is copied.
    parameters = (delta.squeeze(-1), alpha.squeeze(-1), beta.squeeze(-1), gamma, omega)
    if x.numel() == 0:
        return _nothing(x, parameters, truncation, state, return_state)
    result: tuple[Tensor, EMAState | None]
    # Autocast would run the matrix products in low precision, where powers of q near 1 are worthless.
    with without_autocast(x.device):
        result = OP(
            x,
            *parameters,
            bidirectional=bidirectional,
            truncation=truncation,
            lengths=lengths,
            state=state,
            return_state=return_state,
            activation=activation,
            dropout=dropout,
        )
    y, end = result
    return y, None if end is None else with_history_of(end, x, state)


def _nothing(
    x: Tensor, parameters: tuple[Tensor, ...], truncation: int | None, state: EMAState | None, return_state: bool
) -> tuple[Tensor, EMAState | None]:
    """No tokens: nothing comes out, and every parameter still gets a gradient (zero), as on the other ranks."""
    reached = sum((value.sum().to(x.dtype) for value in parameters[:-1]), start=x.new_zeros(()))
    y = x * parameters[-1].to(x.dtype) + reached
    if return_state and state is None:
        state = initial_state(x.shape[0], x.shape[2], parameters[0].shape[1], truncation, like=x)
    return y, state if return_state else None


def _check_shapes(
    x: Tensor, delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, omega: Tensor, bidirectional: bool
) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ShapeError(f"ema: x must be floating point (B, L, D), got {x.dtype} {tuple(x.shape)}")
    rows = x.shape[2] * (2 if bidirectional else 1)
    n_state = gamma.shape[-1]
    expected = {
        "delta": (rows, n_state, 1),
        "alpha": (rows, n_state, 1),
        "beta": (rows, n_state, 1),
        "gamma": (rows, n_state),
        "omega": (x.shape[2],),
    }
    for (name, shape), value in zip(expected.items(), (delta, alpha, beta, gamma, omega), strict=True):
        if tuple(value.shape) != shape:
            direction = "bidirectional" if bidirectional else "causal"
            raise ShapeError(
                f"ema: {name} must be {shape} for a {direction} average of x {tuple(x.shape)}, got {tuple(value.shape)}"
            )


def _check_lengths(x: Tensor, lengths: Tensor | None) -> None:
    if lengths is None:
        return
    if tuple(lengths.shape) != (x.shape[0],) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ShapeError(
            f"ema: lengths must be {x.shape[0]} integers, one per row of x, got {lengths.dtype} {tuple(lengths.shape)}"
        )
    # Looking at the values would make an accelerator wait.
    looking = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if looking and bool(((lengths < 0) | (lengths > x.shape[1])).any()):
        raise ShapeError(f"ema: lengths must lie in 0..{x.shape[1]}, got {lengths.tolist()}")


def _check_state(
    x: Tensor, n_state: int, bidirectional: bool, truncation: int | None, state: EMAState | None, return_state: bool
) -> None:
    if bidirectional and (state is not None or return_state):
        raise StreamingError(
            "ema: a bidirectional average depends on what is still to come; it neither takes nor has a state"
        )
    if state is None:
        return
    expected = initial_state(x.shape[0], x.shape[2], n_state, truncation, like=x.new_empty(0, device="meta"))
    for name in ("hidden", "fresh", "count", "history"):
        have, want = getattr(state, name), getattr(expected, name)
        found = None if have is None else (tuple(have.shape), have.dtype)
        rule = None if want is None else (tuple(want.shape), want.dtype)
        if name == "history" and found is not None and rule is not None and found[1].is_floating_point:
            rule = (rule[0], found[1])  # tokens may have come in another dtype before
        if found != rule:
            raise StreamingError(
                f"ema: state.{name} must be {rule} for x {tuple(x.shape)}, truncation {truncation}, got {found}"
            )


def _why_not_triton(
    x: Tensor,
    *parameters: Tensor,
    truncation: int | None,
    state: EMAState | None,
    return_state: bool,
    **options: object,
) -> str | None:
    reason = why_not_triton_on(x)
    if reason is not None:
        return reason
    if parameters[0].shape[1] > MAXIMUM_STATES:
        return f"the kernel holds at most {MAXIMUM_STATES} states of a channel, got {parameters[0].shape[1]}"
    if x.shape[1] * x.shape[2] >= 2**31:
        return f"the kernel takes sequences of less than 2^31 numbers, got {x.shape[1]} x {x.shape[2]}"
    wrong = [value.dtype for value in parameters if value.dtype not in FLOATS]
    if wrong:
        return f"the kernel takes parameters in float32 or less, got {wrong[0]}"
    if not (return_state or state is not None):
        return None
    if truncation is not None and x.shape[1] <= STEP_LENGTH and forced_backend() != "triton":
        return f"the recurrence is faster for up to {STEP_LENGTH} tokens of a truncated stream, got {x.shape[1]}"
    carried = () if state is None else (state.hidden,)
    if torch.is_grad_enabled() and any(value.requires_grad for value in (x, *parameters, *carried)):
        return "the kernel has no gradient through a carried state"
    return None


@OP.backend("triton", priority=10, applies=_why_not_triton)
def _triton(
    x: Tensor,
    *parameters: Tensor,
    bidirectional: bool,
    truncation: int | None,
    lengths: Tensor | None,
    state: EMAState | None,
    return_state: bool,
    activation: Activation,
    dropout: float,
) -> tuple[Tensor, EMAState | None]:
    from sma_modules.ops.ema import fused

    if truncation is not None and (return_state or state is not None):
        from sma_modules.ops.ema.windowed import windowed

        y, end = windowed(
            x,
            parameters,
            truncation=truncation,
            lengths=lengths,
            state=state,
            activation=activation,
            dropout=dropout,
        )
        return y, end if return_state else None
    y, hidden = fused.ema(
        x,
        parameters,
        bidirectional=bidirectional,
        truncation=truncation,
        lengths=lengths,
        hidden=None if state is None else state.hidden,
        stream=return_state,
        activation=activation,
        dropout=dropout,
    )
    return y, None if hidden is None else EMAState(hidden)


from sma_modules.ops.ema import eager, reference  # noqa: E402,F401  (registers the backends)
