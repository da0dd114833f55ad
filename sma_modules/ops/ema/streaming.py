"""Chunks of a stream, from a state to the next one. README.md has the derivations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sma_modules.ops.ema.chunked import chunked_stream
from sma_modules.ops.ema.convolution import convolve
from sma_modules.ops.ema.decay import Decay, kernel, powers
from sma_modules.ops.ema.state import EMAState, initial_state


def _summed(inputs: Tensor, decay: Decay) -> Tensor:
    """``(B, D, N)``: S after ``inputs (B, T, D)``, newest last, from nothing."""
    batch, length, dim = inputs.shape
    coarse, fine = powers(decay.log_q, length)
    rows, width = coarse.shape[1], fine.shape[1]
    padded = torch.nn.functional.pad(inputs.flip(1), (0, 0, 0, rows * width - length))
    blocks = padded.reshape(batch * rows, width, dim).permute(2, 0, 1)
    sums = torch.bmm(blocks, fine).reshape(dim, batch, rows, -1)
    return ((sums * coarse[:, None]).sum(2) * decay.drive[:, None]).transpose(0, 1)


def _faded(hidden: Tensor, decay: Decay, length: int) -> Tensor:
    """``(B, L, D)``: what ``hidden (B, D, N)`` still gives after 1..L further steps."""
    batch, dim, _ = hidden.shape
    coarse, fine = powers(decay.log_q, length)
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


def chunk(x: Tensor, decay: Decay, lengths: Tensor | None, start: EMAState, begins: bool) -> tuple[Tensor, EMAState]:
    """A chunk without truncation: convolution, plus what the state still gives.

    On a CPU, where all of it is real and nothing has a gradient, from one short chunk to the next.
    """
    length = x.shape[1]
    plain = x.device.type == "cpu" and lengths is None and not torch.compiler.is_compiling()
    if plain and not (torch.is_grad_enabled() and any(each.requires_grad for each in (x, start.hidden, *decay))):
        y, hidden = chunked_stream(x, decay.log_q, decay.drive, decay.read, start.hidden)
        return y, EMAState(hidden)
    y = convolve(x, kernel(decay, length))
    hidden = _summed(latest(x, lengths, length), decay)
    if not begins:
        y = y + _faded(start.hidden, decay, length)
        steps = x.new_tensor(length) if lengths is None else lengths[:, None, None].to(x.dtype)
        hidden = hidden + start.hidden * torch.exp(decay.log_q * steps)
    return y, EMAState(hidden)


def truncated_chunk(
    x: Tensor, decay: Decay, lengths: Tensor | None, start: EMAState, begins: bool
) -> tuple[Tensor, EMAState]:
    """A chunk with truncation: convolution over the remembered inputs and the chunk; the window is summed anew."""
    assert start.history is not None
    taps = past = start.history.shape[1]
    inputs = x
    if begins:  # only zeros came before
        taps, past = min(taps, x.shape[1]), 0
    else:
        inputs = torch.cat([start.history.to(x.dtype), x], dim=1)
    y = convolve(inputs, kernel(decay, taps))[:, past:]
    return y, _after_window(latest(inputs, lengths, taps, offset=past), decay, lengths, start)


def _after_window(window: Tensor, decay: Decay, lengths: Tensor | None, start: EMAState) -> EMAState:
    """The state of a truncated average after its last inputs ``window (B, taps, D)``, summed anew.

    Rows without tokens, by their ``lengths``, keep the state they had at the ``start``.
    """
    truncation = start.truncation or 0
    history = torch.nn.functional.pad(window, (0, 0, truncation - window.shape[1], 0))
    zeros = initial_state(window.shape[0], window.shape[2], decay.loss.shape[1], 1, like=window)
    end = EMAState(_summed(window, decay), zeros.fresh, zeros.count, history)
    return end if lengths is None else _keep(start, end, lengths == 0)


def _keep(old: EMAState, new: EMAState, rows: Tensor) -> EMAState:
    """``new``, with ``rows (B,)`` taken from ``old``."""
    before = iter(old.tensors())
    return new.map(lambda tensor: torch.where(rows.reshape(-1, *[1] * (tensor.dim() - 1)), next(before), tensor))


def steps(x: Tensor, decay: Decay, lengths: Tensor | None, start: EMAState) -> tuple[Tensor, EMAState]:
    """The recurrence, all rows and channels at once."""
    truncation = start.truncation
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
