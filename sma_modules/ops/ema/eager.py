"""ema as a Fourier convolution, with the recurrence for a few tokens at a time. README.md has the derivations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.dropout import dropout, dropout_
from sma.transforms import transformed
from sma_modules.ops.ema.chunked import chunked
from sma_modules.ops.ema.convolution import convolve
from sma_modules.ops.ema.decay import Decay, coefficients, kernel
from sma_modules.ops.ema.state import EMAState, initial_state
from sma_modules.ops.ema.streaming import chunk, steps, truncated_chunk
from sma_modules.ops.ema.types import STEP_LENGTH, EMAOptions, EMAParameters, EMAStream


def ema(x: Tensor, parameters: EMAParameters, options: EMAOptions, stream: EMAStream) -> tuple[Tensor, EMAState | None]:
    """See :func:`sma_modules.ops.ema.ema`."""
    narrow, (lengths, state, keep), end = x.dtype, stream, None
    dtype = torch.promote_types(narrow, torch.float32)
    x, omega, decay = x.to(dtype), parameters.omega.to(dtype), coefficients(parameters, dtype)
    inner = x
    if lengths is not None:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        inner = x.masked_fill(padding[..., None], 0)
    if state is None and not keep:
        y = _whole(x, inner, decay, omega, options)
    else:
        start = state
        if start is None:
            start = initial_state(x.shape[0], x.shape[2], decay.loss.shape[1], options.truncation, like=x)
        if x.shape[1] <= STEP_LENGTH:
            y, end = steps(inner, decay, lengths, start)
        else:
            run = chunk if options.truncation is None else truncated_chunk
            y, end = run(inner, decay, lengths, start, begins=state is None)
        y = torch.addcmul(y, omega, x)
    if options.activation == "silu":
        y = F.silu(y)
    if options.dropout:
        y = dropout_(y, options.dropout) if options.activation == "silu" else dropout(y, options.dropout)
    return y.to(narrow), end if keep else None


def _whole(x: Tensor, inner: Tensor, decay: Decay, omega: Tensor, options: EMAOptions) -> Tensor:
    """Whole sequences; ``inner`` is ``x`` itself where nothing is padded.

    On a CPU the chunks of a causal average are twice as fast as transforms, those of a bidirectional one are not.
    """
    length, dim = x.shape[1:]
    taps = length if options.truncation is None else min(length, options.truncation)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()  # the steps would be unrolled
    if on_cpu and taps == length and not options.bidirectional and not transformed():
        y = chunked(inner, decay.log_q, decay.read * decay.drive, omega if inner is x else None)
        return y if inner is x else torch.addcmul(y, omega, x)
    kernels = torch.split(kernel(decay, taps), dim)  # of one direction, or of both
    return torch.addcmul(convolve(inner, *kernels), omega, x)
