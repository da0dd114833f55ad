"""A chunk of a stream of a truncated average, by the kernels for whole sequences.

The output at t is a sum over the last K inputs, and the last K before the chunk are part of the state. So the kernels
run over these and the chunk, as over one sequence, and what they give for the first K is thrown away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.ema import fused
from sma_modules.ops.ema.eager import after_window, coefficients, latest
from sma_modules.ops.ema.state import EMAState, initial_state


def windowed(
    x: Tensor,
    parameters: tuple[Tensor, ...],
    *,
    truncation: int,
    lengths: Tensor | None,
    state: EMAState | None,
    activation: str,
    dropout: float,
) -> tuple[Tensor, EMAState]:
    """See :func:`sma_modules.ops.ema.ema`; the state that comes out is summed anew, and so carries no rounding."""
    sizes = x.shape[0], x.shape[2], parameters[3].shape[1], truncation
    start = initial_state(*sizes, like=x) if state is None else state
    inputs, past = x, 0
    if state is not None and state.history is not None:
        # What is kept came in the dtype of x, so it goes back to it without loss.
        inputs, past = torch.cat([state.history.to(x.dtype), x], dim=1), truncation
    shifted = None if lengths is None else lengths + past
    y, _ = fused.ema(
        inputs,
        parameters,
        bidirectional=False,
        truncation=truncation,
        lengths=shifted,
        hidden=None,
        stream=False,
        activation=activation,
        dropout=dropout,
    )
    decay = coefficients(*(each.float() for each in parameters[:4]))
    taps = min(truncation, inputs.shape[1])
    window = latest(inputs, lengths, taps, offset=past).float()
    return y[:, past:], after_window(window, decay, truncation, lengths, start)
