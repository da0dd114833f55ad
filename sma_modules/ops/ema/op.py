"""ema: checks, and the choice of a backend."""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ConfigError, ShapeError, StreamingError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import FLOATS, why_not_interpreted, why_not_triton
from sma_modules.ops.ema import eager, reference
from sma_modules.ops.ema.state import EMAState, initial_state, with_history_of
from sma_modules.ops.ema.types import STEP_LENGTH, Activation, EMAOptions, EMAParameters, EMAStream, Signature

MAXIMUM_STATES = 16
"""More than these of one channel do not fit into the registers of a thread."""
ACTIVATIONS = get_args(Activation)


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
        state: of the stream after the tokens before; None at its beginning. Causal only.
        return_state: also return the state after the last real token of each row. Causal only.
        activation: ``"silu"`` or ``"none"``, of the sum of average and direct path.
        dropout: probability, 0 up to but not 1, with which an output becomes zero; 0 when not training.

    Returns:
        ``y (B, L, D)`` in the dtype of ``x``, and the state or None. At padded positions y is undefined.

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
    options = EMAOptions(bidirectional, truncation, activation, dropout)
    _check(x, EMAParameters(delta, alpha, beta, gamma, omega), options)
    stream = EMAStream(lengths, state, return_state)
    if lengths is not None or state is not None or return_state:
        _check_stream(x, gamma.shape[1], options, stream)
    # Not [..., 0]: its gradient is copied into a tensor of zeros.
    parameters = EMAParameters(delta.squeeze(-1), alpha.squeeze(-1), beta.squeeze(-1), gamma, omega)
    if x.numel() == 0:
        return _without_tokens(x, parameters, options, stream)
    # With autocast off: it would run the matrix products in low precision, where powers of q near 1 are worthless.
    y, end = OP.run(_signature(x, parameters, options, stream), x, parameters, options, stream)
    return y, None if end is None else with_history_of(end, x, state)


def _without_tokens(
    x: Tensor, parameters: EMAParameters, options: EMAOptions, stream: EMAStream
) -> tuple[Tensor, EMAState | None]:
    """The output has no tokens, and every parameter still gets a gradient (zero), as on the other ranks."""
    reached = sum((value.sum().to(x.dtype) for value in parameters[:-1]), start=x.new_zeros(()))
    y = x * parameters.omega.to(x.dtype) + reached
    state = stream.state
    if stream.keep and state is None:
        state = initial_state(x.shape[0], x.shape[2], parameters.gamma.shape[1], options.truncation, like=x)
    return y, state if stream.keep else None


def _check(x: Tensor, parameters: EMAParameters, options: EMAOptions) -> None:
    """Shapes as the caller gives them, and options."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ShapeError(f"ema: x must be floating point (B, L, D), got {x.dtype} {tuple(x.shape)}")
    matrix = (x.shape[2] * (2 if options.bidirectional else 1), parameters.gamma.shape[-1])
    column = (*matrix, 1)
    for name, value, shape in zip(
        parameters._fields, parameters, (column, column, column, matrix, x.shape[2:]), strict=True
    ):
        if value.shape != shape:
            direction = "bidirectional" if options.bidirectional else "causal"
            raise ShapeError(
                f"ema: {name} must be {tuple(shape)} for a {direction} average of x {tuple(x.shape)}, "
                f"got {tuple(value.shape)}"
            )
    if options.truncation is not None and options.truncation < 1:
        raise ConfigError(f"ema: truncation must be None or at least 1, got {options.truncation}")
    if options.activation not in ACTIVATIONS:
        raise ConfigError(f"ema: activation must be one of {', '.join(ACTIVATIONS)}, got {options.activation!r}")
    if not 0 <= options.dropout < 1:
        raise ConfigError(f"ema: dropout must be at least 0 and below 1, got {options.dropout}")


def _check_stream(x: Tensor, n_state: int, options: EMAOptions, stream: EMAStream) -> None:
    lengths, state, keep = stream
    if lengths is not None:
        if tuple(lengths.shape) != (x.shape[0],) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ShapeError(
                f"ema: lengths must be {x.shape[0]} integers, one per row of x, got {lengths.dtype} "
                f"{tuple(lengths.shape)}"
            )
        # Reading values on an accelerator would synchronise with the device.
        readable = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and bool(((lengths < 0) | (lengths > x.shape[1])).any()):
            raise ShapeError(f"ema: lengths must lie in 0..{x.shape[1]}, got {lengths.tolist()}")
    if options.bidirectional and (state is not None or keep):
        raise StreamingError(
            "ema: a bidirectional average depends on tokens still to come; it neither takes nor has a state"
        )
    if state is None:
        return
    expected = initial_state(x.shape[0], x.shape[2], n_state, options.truncation, like=x.new_empty(0, device="meta"))
    for name in ("hidden", "fresh", "count", "history"):
        have, want = getattr(state, name), getattr(expected, name)
        found = None if have is None else (tuple(have.shape), have.dtype)
        rule = None if want is None else (tuple(want.shape), want.dtype)
        if name == "history" and found is not None and rule is not None and found[1].is_floating_point:
            rule = (rule[0], found[1])  # tokens may have come in another dtype before
        if found != rule:
            raise StreamingError(
                f"ema: state.{name} must be {rule} for x {tuple(x.shape)}, truncation {options.truncation}, got {found}"
            )


def _signature(x: Tensor, parameters: EMAParameters, options: EMAOptions, stream: EMAStream) -> Signature:
    few = carried_gradient = False
    if stream.keep or stream.state is not None:
        few = options.truncation is not None and x.shape[1] <= STEP_LENGTH
        carried = () if stream.state is None else (stream.state.hidden,)
        carried_gradient = torch.is_grad_enabled() and any(value.requires_grad for value in (x, *parameters, *carried))
    delta, alpha, beta, gamma, omega = parameters
    return Signature(
        x.device,
        x.dtype,
        (delta.dtype, alpha.dtype, beta.dtype, gamma.dtype, omega.dtype),
        gamma.shape[1],
        x.shape[1] * x.shape[2] >= 2**31,
        few,
        carried_gradient,
    )


def _why_not_triton(signature: Signature) -> str | None:
    reason = why_not_triton(signature.device, signature.dtype)
    if reason is not None:
        return reason
    if signature.n_state > MAXIMUM_STATES:
        return f"the kernel holds at most {MAXIMUM_STATES} states of a channel, got {signature.n_state}"
    if signature.large:
        return "the kernel takes sequences of less than 2^31 numbers"
    for dtype in signature.parameters:
        if dtype not in FLOATS:
            return f"the kernel takes parameters in float32 or less, got {dtype}"
    if signature.carried_gradient:
        return "the kernel has no gradient through a carried state"
    return None


def _why_not_worth_it(signature: Signature) -> str | None:
    if signature.few:
        return f"the recurrence is faster for up to {STEP_LENGTH} tokens of a truncated stream"
    return why_not_interpreted(signature)


OP = Op("ema", _signature)
OP.register(
    "triton", lazy("sma_modules.ops.ema.launch", "ema"), priority=10, applies=_why_not_triton, pays=_why_not_worth_it
)
OP.register("eager", eager.ema)
OP.register("reference", reference.ema, priority=90)
