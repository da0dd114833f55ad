"""The definition of ema: one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.ema.state import EMAState, compute_dtype, initial_state
from sma_modules.ops.ema.types import EMAOptions, EMAParameters, EMAStream


def ema(x: Tensor, parameters: EMAParameters, options: EMAOptions, stream: EMAStream) -> tuple[Tensor, EMAState | None]:
    """The recurrence, as in the paper."""
    bidirectional, truncation, activation, dropout = options
    lengths, state, keep = stream
    batch, length, dim = x.shape
    narrow, dtype = x.dtype, compute_dtype(x)
    x, delta, alpha, beta, gamma, omega = (value.to(dtype) for value in (x, *parameters))
    if lengths is None:
        lengths = torch.full((batch,), length, device=x.device)
    p = torch.sigmoid(delta)
    q = 1 - p * torch.sigmoid(alpha)
    drive = p * beta
    read = gamma / gamma.shape[1] ** 0.5

    real = torch.arange(length, device=x.device) < lengths[:, None]
    inner = torch.where(real[..., None], x, 0)
    start = initial_state(batch, dim, gamma.shape[1], truncation, like=x) if state is None else state
    states, end = _run(inner, lengths, q[:dim], drive[:dim], start)
    y = omega * x + torch.einsum("lbdn,dn->bld", states, read[:dim])
    if bidirectional:
        start = initial_state(batch, dim, gamma.shape[1], truncation, like=x)
        states, _ = _run(inner.flip(1), lengths, q[dim:], drive[dim:], start)
        y = y + torch.einsum("lbdn,dn->bld", states.flip(0), read[dim:])
    y = y * torch.sigmoid(y) if activation == "silu" else y
    return torch.dropout(y, dropout, dropout > 0).to(narrow), end if keep else None


def _run(x: Tensor, lengths: Tensor, q: Tensor, drive: Tensor, state: EMAState) -> tuple[Tensor, EMAState]:
    """S_t of every position ``(L, B, D, N)``, and the state after the last real token of each row."""
    end = hidden = state.hidden
    end_history = history = None if state.history is None else state.history.to(x.dtype)
    states = []
    for t in range(x.shape[1]):
        real = (t < lengths)[:, None, None]
        if history is None or end_history is None:
            hidden = q * hidden + drive * x[:, t, :, None]
        else:
            history = torch.cat([history[:, 1:], x[:, t : t + 1]], dim=1)
            hidden = _window(history, q, drive)
            end_history = torch.where(real, history, end_history)
        end = torch.where(real, hidden, end)
        states.append(hidden)
    if state.truncation is None:
        return torch.stack(states), EMAState(end)
    nothing = torch.zeros_like(end), torch.zeros_like(lengths, dtype=torch.int64)
    return torch.stack(states), EMAState(end, *nothing, end_history)


def _window(history: Tensor, q: Tensor, drive: Tensor) -> Tensor:
    """Truncation: the same recurrence, but begun K tokens ago with nothing."""
    hidden = torch.zeros_like(history[:, 0, :, None] * q)
    for u in history.unbind(1):
        hidden = q * hidden + drive * u[..., None]
    return hidden
