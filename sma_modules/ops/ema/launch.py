"""ema by the kernels: whole sequences with their gradient, and chunks of a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.kernel import draw_seed
from sma.transforms import once_differentiable
from sma_modules.ops.ema.operators import after_window, ema_backward, ema_forward
from sma_modules.ops.ema.state import EMAState
from sma_modules.ops.ema.types import EMAOptions, EMAParameters, EMAStream


class _Average(torch.autograd.Function):
    """Keeps the input, what was before the activation, and the coefficients. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        alpha: Tensor,
        beta: Tensor,
        gamma: Tensor,
        omega: Tensor,
        lengths: Tensor | None,
        seed: Tensor | None,
        options: EMAOptions,
    ) -> Tensor:
        parameters = (delta, alpha, beta, gamma, omega)
        y: Tensor
        y, pre, table, reach, _ = ema_forward(x, *parameters, lengths, None, seed, *_flat(options), True, False)
        ctx.save_for_backward(x, pre, table, reach, *parameters, lengths, seed)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, lengths, seed = ctx.saved_tensors
        gradients = ema_backward(dy.contiguous(), *saved, lengths, seed, ctx.options.truncation, ctx.options.dropout)
        return *gradients, None, None, None


def _flat(options: EMAOptions) -> tuple[Any, ...]:
    """As the operators take them."""
    return options.bidirectional, options.truncation, options.activation == "silu", options.dropout


def ema(x: Tensor, parameters: EMAParameters, options: EMAOptions, stream: EMAStream) -> tuple[Tensor, EMAState | None]:
    """See :func:`sma_modules.ops.ema.ema`; gradients only where no state is kept."""
    parameters = EMAParameters(*(value.contiguous() for value in parameters))
    lengths, state, keep = stream
    lengths = None if lengths is None else lengths.contiguous()
    seed = draw_seed(x.device) if options.dropout > 0 else None
    if options.truncation is not None and (keep or state is not None):
        y, end = _truncated_chunk(x, parameters, options, EMAStream(lengths, state, keep), seed)
        return y, end if keep else None
    x, hidden = x.contiguous(), None if state is None else state.hidden.contiguous()
    if not keep and torch.is_grad_enabled() and any(value.requires_grad for value in (x, *parameters)):
        y = _Average.apply(x, *parameters, lengths, seed, options)  # type: ignore[no-untyped-call]
        return y, None
    y, _, _, _, after = ema_forward(x, *parameters, lengths, hidden, seed, *_flat(options), False, keep)
    return y, EMAState(after) if keep else None


def _truncated_chunk(
    x: Tensor, parameters: EMAParameters, options: EMAOptions, stream: EMAStream, seed: Tensor | None
) -> tuple[Tensor, EMAState]:
    """A chunk of a stream of a truncated average, by the kernels for whole sequences.

    The output at t is a sum over the last K inputs, and the last K before the chunk are part of the state. So the
    kernels run over these and the chunk, as over one sequence, but give no output for the first K. The state that comes
    out is summed anew, and so carries no rounding.
    """
    inputs, past, state = x.contiguous(), 0, stream.state
    if state is not None and state.history is not None:
        # The inputs kept came in the dtype of x, so they go back to it without loss.
        past = state.history.shape[1]
        inputs = torch.cat([state.history.to(x.dtype), x], dim=1)
    y, _, table, _, _ = ema_forward(
        inputs, *parameters, stream.lengths, None, seed, *_flat(options), False, False, past
    )
    had = (None, None, None) if state is None else (state.hidden, state.fresh, state.count)
    before = [None if each is None else each.contiguous() for each in had]
    n_state = parameters.gamma.shape[1]
    return y, EMAState(*after_window(inputs, table, stream.lengths, *before, past, options.truncation, n_state))
