"""The definition of ema: one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.ema import OP
from sma_modules.ops.ema.state import EMAState, compute_dtype, finished, initial_state


@OP.backend("reference", priority=90)
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
    """The recurrence, as in the paper. Parameters are ``(D | 2 D, N)`` and ``omega (D,)``."""
    batch, length, dim = x.shape
    narrow, dtype = x.dtype, compute_dtype(x)
    x, delta, alpha, beta, gamma, omega = (value.to(dtype) for value in (x, delta, alpha, beta, gamma, omega))
    if lengths is None:
        lengths = torch.full((batch,), length, device=x.device)
    p = torch.sigmoid(delta)
    q = 1 - p * torch.sigmoid(alpha)
    drive = p * beta
    read = gamma / gamma.shape[1] ** 0.5

    real = torch.arange(length, device=x.device) < lengths[:, None]
    inner = torch.where(real[..., None], x, 0)
    start = initial_state(batch, dim, gamma.shape[1], truncation, like=x) if state is None else state
    states, end = _run(inner, lengths, q[:dim], drive[:dim], truncation, start)
    y = omega * x + torch.einsum("lbdn,dn->bld", states, read[:dim])
    if bidirectional:
        start = initial_state(batch, dim, gamma.shape[1], truncation, like=x)
        states, _ = _run(inner.flip(1), lengths, q[dim:], drive[dim:], truncation, start)
        y = y + torch.einsum("lbdn,dn->bld", states.flip(0), read[dim:])
    return finished(y, activation, dropout, narrow), end if return_state else None


def _run(
    x: Tensor, lengths: Tensor, q: Tensor, drive: Tensor, truncation: int | None, state: EMAState
) -> tuple[Tensor, EMAState]:
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
    if truncation is None:
        return torch.stack(states), EMAState(end)
    nothing = torch.zeros_like(end), torch.zeros_like(lengths, dtype=torch.int64)
    return torch.stack(states), EMAState(end, *nothing, end_history)


def _window(history: Tensor, q: Tensor, drive: Tensor) -> Tensor:
    """Truncation: the same recurrence, but begun K tokens ago with nothing."""
    hidden = torch.zeros_like(history[:, 0, :, None] * q)
    for u in history.unbind(1):
        hidden = q * hidden + drive * u[..., None]
    return hidden
