"""ema as a Fourier convolution, with the recurrence for a few tokens at a time. README.md has the derivations."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sma_modules.ops.ema import OP, STEP_LENGTH
from sma_modules.ops.ema.chunked import chunked, chunked_stream
from sma_modules.ops.ema.convolution import convolve
from sma_modules.ops.ema.state import EMAState, compute_dtype, finished, initial_state


class Decay(NamedTuple):
    """``(D, N)`` each: S_t = S_{t-1} - loss * S_{t-1} + drive * x_t, out = sum_n read * S_t, log_q = log(1 - loss)."""

    log_q: Tensor
    loss: Tensor
    drive: Tensor
    read: Tensor


@OP.backend("eager")
def ema(
    x: Tensor,
    delta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    *,
    bidirectional: bool,
    truncation: int | None,
    lengths: Tensor | None,
    state: EMAState | None,
    return_state: bool,
    activation: str,
    dropout: float,
) -> tuple[Tensor, EMAState | None]:
    """See :func:`sma_modules.ops.ema.ema`; parameters are ``(D | 2 D, N)`` and ``omega (D,)``."""
    batch, length, dim = x.shape
    narrow, dtype = x.dtype, compute_dtype(x)
    x, delta, alpha, beta, gamma, omega = (value.to(dtype) for value in (x, delta, alpha, beta, gamma, omega))
    inner = x if lengths is None else x.masked_fill(_padding(lengths, length)[..., None], 0)
    decay = coefficients(delta, alpha, beta, gamma)
    if state is None and not return_state:
        y, end = _whole(x, inner, decay, omega, bidirectional, truncation), None
    else:
        start = initial_state(batch, dim, gamma.shape[1], truncation, like=x) if state is None else state
        if length <= STEP_LENGTH:
            y, end = _steps(inner, decay, truncation, lengths, start)
        elif truncation is None:
            y, end = _chunk(inner, decay, lengths, start, begins=state is None)
        else:
            y, end = _truncated_chunk(inner, decay, truncation, lengths, start, begins=state is None)
        y = torch.addcmul(y, omega, x)
    return finished(y, activation, dropout, narrow), end if return_state else None


def _whole(
    x: Tensor, inner: Tensor, decay: Decay, omega: Tensor, bidirectional: bool, truncation: int | None
) -> Tensor:
    """Whole sequences; ``inner`` is ``x`` itself where nothing is padded.

    On a CPU the chunks of a causal average are twice as fast as transforms, those of a bidirectional one are not.
    """
    length, dim = x.shape[1:]
    taps = length if truncation is None else min(length, truncation)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()  # the steps would be unrolled
    if on_cpu and taps == length and not bidirectional:
        y = chunked(inner, decay.log_q, decay.read * decay.drive, omega if inner is x else None)
        return y if inner is x else torch.addcmul(y, omega, x)
    rows = range(0, 2 * dim if bidirectional else dim, dim)
    kernels = [_kernel(Decay(*(value[first : first + dim] for value in decay)), taps) for first in rows]
    return torch.addcmul(convolve(inner, *kernels), omega, x)


def _padding(lengths: Tensor, length: int) -> Tensor:
    """``(B, L)`` True at padding."""
    return torch.arange(length, device=lengths.device) >= lengths[:, None]


def coefficients(delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Decay:
    """The recurrence's coefficients; log q keeps its precision for q near 1 and stays finite for q near 0."""
    p = torch.sigmoid(delta)
    loss = p * torch.sigmoid(alpha)
    slow = torch.log1p(-loss.clamp(max=0.5))
    # 1 - p a = (1 - p) + p (1 - a), without cancellation; the floor keeps 0 * log q from being nan.
    q = torch.sigmoid(-delta) + p * torch.sigmoid(-alpha)
    fast = q.clamp(min=torch.finfo(q.dtype).tiny).log()
    return Decay(torch.where(loss < 0.5, slow, fast), loss, p * beta, gamma * gamma.shape[1] ** -0.5)


def _powers(log_q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``coarse (D, A, N)`` and ``fine (D, C, N)``: ``q^(a C + c) = coarse[a] * fine[c]``, A * C at least ``count``.

    Two factors cost about 2 sqrt(count) exponentials and memory, where the plain table of powers costs ``count``.
    """
    width = 1 << ((max(count, 1) - 1).bit_length() + 1) // 2
    rows = -(-count // width)
    fine = torch.arange(width, device=log_q.device, dtype=log_q.dtype)
    coarse = torch.arange(rows, device=log_q.device, dtype=log_q.dtype) * width
    return tuple(torch.exp(log_q[:, None] * steps[:, None]) for steps in (coarse, fine))  # type: ignore[return-value]


def _kernel(decay: Decay, taps: int) -> Tensor:
    """``(D, taps)``: k[j] = sum_n read * drive * q^j."""
    coarse, fine = _powers(decay.log_q, taps)
    weighted = coarse * (decay.read * decay.drive)[:, None]
    return torch.bmm(weighted, fine.transpose(1, 2)).flatten(1)[:, :taps]


def _summed(inputs: Tensor, decay: Decay) -> Tensor:
    """``(B, D, N)``: S after ``inputs (B, T, D)``, newest last, from nothing."""
    batch, length, dim = inputs.shape
    coarse, fine = _powers(decay.log_q, length)
    rows, width = coarse.shape[1], fine.shape[1]
    padded = torch.nn.functional.pad(inputs.flip(1), (0, 0, 0, rows * width - length))
    blocks = padded.reshape(batch * rows, width, dim).permute(2, 0, 1)
    sums = torch.bmm(blocks, fine).reshape(dim, batch, rows, -1)
    return ((sums * coarse[:, None]).sum(2) * decay.drive[:, None]).transpose(0, 1)


def _faded(hidden: Tensor, decay: Decay, length: int) -> Tensor:
    """``(B, L, D)``: what ``hidden (B, D, N)`` still gives after 1..L further steps."""
    batch, dim, _ = hidden.shape
    coarse, fine = _powers(decay.log_q, length)
    weighted = (hidden * (decay.read * decay.log_q.exp())).transpose(0, 1)[:, :, None] * coarse[:, None]
    out = torch.bmm(weighted.flatten(1, 2), fine.transpose(1, 2))
    return out.reshape(dim, batch, -1)[..., :length].permute(1, 2, 0)


def latest(x: Tensor, lengths: Tensor | None, count: int, offset: int = 0) -> Tensor:
    """``(B, count, D)``: the last ``count`` real inputs of each row, newest last, zeros where there are none.

    ``offset`` is how many columns, all real, come before the ``lengths`` counted ones.
    """
    length = x.shape[1]
    if lengths is None:
        return torch.nn.functional.pad(x[:, max(length - count, 0) :], (0, 0, max(count - length, 0), 0))
    column = torch.arange(count, device=x.device) + (lengths + offset - count)[:, None]
    rows = x.gather(1, column.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    return rows.masked_fill((column < 0)[..., None], 0)


def _chunk(x: Tensor, decay: Decay, lengths: Tensor | None, start: EMAState, begins: bool) -> tuple[Tensor, EMAState]:
    """A chunk without truncation: convolution, plus what the state still gives.

    On a CPU, where all of it is real and nothing has a gradient, from one short chunk to the next.
    """
    length = x.shape[1]
    plain = x.device.type == "cpu" and lengths is None and not torch.compiler.is_compiling()
    if plain and not (torch.is_grad_enabled() and any(each.requires_grad for each in (x, start.hidden, *decay))):
        y, hidden = chunked_stream(x, decay.log_q, decay.drive, decay.read, start.hidden)
        return y, EMAState(hidden)
    y = convolve(x, _kernel(decay, length))
    hidden = _summed(latest(x, lengths, length), decay)
    if not begins:
        y = y + _faded(start.hidden, decay, length)
        steps = x.new_tensor(length) if lengths is None else lengths[:, None, None].to(x.dtype)
        hidden = hidden + start.hidden * torch.exp(decay.log_q * steps)
    return y, EMAState(hidden)


def _truncated_chunk(
    x: Tensor, decay: Decay, truncation: int, lengths: Tensor | None, start: EMAState, begins: bool
) -> tuple[Tensor, EMAState]:
    """A chunk with truncation: convolution over the remembered inputs and the chunk; the window is summed anew."""
    taps, past = truncation, truncation
    if begins:  # nothing but zeros to remember
        taps, past = min(truncation, x.shape[1]), 0
    inputs = x if begins or start.history is None else torch.cat([start.history.to(x.dtype), x], dim=1)
    y = convolve(inputs, _kernel(decay, taps))[:, past:]
    return y, after_window(latest(inputs, lengths, taps, offset=past), decay, truncation, lengths, start)


def after_window(window: Tensor, decay: Decay, truncation: int, lengths: Tensor | None, start: EMAState) -> EMAState:
    """The state of a truncated average after its last inputs ``window (B, taps, D)``, summed anew.

    Rows that took nothing, by their ``lengths``, keep the state they had at the ``start``.
    """
    history = torch.nn.functional.pad(window, (0, 0, truncation - window.shape[1], 0))
    zeros = initial_state(window.shape[0], window.shape[2], decay.loss.shape[1], 1, like=window)
    end = EMAState(_summed(window, decay), zeros.fresh, zeros.count, history)
    return end if lengths is None else _keep(start, end, lengths == 0)


def _keep(old: EMAState, new: EMAState, rows: Tensor) -> EMAState:
    """``new``, with ``rows (B,)`` taken from ``old``."""
    before = iter(old.tensors())
    return new.map(lambda tensor: torch.where(rows.reshape(-1, *[1] * (tensor.dim() - 1)), next(before), tensor))


def _steps(
    x: Tensor, decay: Decay, truncation: int | None, lengths: Tensor | None, start: EMAState
) -> tuple[Tensor, EMAState]:
    """The recurrence, all rows and channels at once."""
    inputs = x if start.history is None else torch.cat([start.history.to(x.dtype), x], dim=1)
    hidden, fresh, count = start.hidden, start.fresh, start.count
    end = EMAState(hidden, fresh, count)
    leaving = None if truncation is None else decay.drive * torch.exp(decay.log_q * truncation)
    outputs = []
    for t in range(x.shape[1]):
        entering = x[:, t, :, None] * decay.drive
        hidden = hidden - decay.loss * hidden + entering
        if leaving is not None and truncation is not None and fresh is not None and count is not None:
            hidden = hidden - inputs[:, t, :, None] * leaving
            fresh = fresh - decay.loss * fresh + entering
            full = count + 1 == truncation
            hidden = torch.where(full[:, None, None], fresh, hidden)
            fresh = fresh.masked_fill(full[:, None, None], 0)
            count = (count + 1).masked_fill(full, 0)
        outputs.append((hidden * decay.read).sum(-1))
        now = EMAState(hidden, fresh, count)
        end = now if lengths is None else _keep(end, now, lengths <= t)
    history = None if truncation is None else latest(inputs, lengths, truncation, offset=truncation)
    return torch.stack(outputs, dim=1), replace(end, history=history)
