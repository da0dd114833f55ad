"""The coefficients of the recurrence, and powers of its decay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sma_modules.ops.ema.types import EMAParameters


class Decay(NamedTuple):
    """``(D, N)`` each: S_t = S_{t-1} - loss * S_{t-1} + drive * x_t, out = sum_n read * S_t, log_q = log(1 - loss)."""

    log_q: Tensor
    loss: Tensor
    drive: Tensor
    read: Tensor


def coefficients(parameters: EMAParameters, dtype: torch.dtype) -> Decay:
    """The recurrence's coefficients; log q keeps its precision for q near 1 and stays finite for q near 0."""
    delta, alpha, gamma = parameters.delta.to(dtype), parameters.alpha.to(dtype), parameters.gamma.to(dtype)
    p = torch.sigmoid(delta)
    loss = p * torch.sigmoid(alpha)
    slow = torch.log1p(-loss.clamp(max=0.5))
    # 1 - p a = (1 - p) + p (1 - a), without cancellation; the floor keeps 0 * log q from being nan.
    q = torch.sigmoid(-delta) + p * torch.sigmoid(-alpha)
    fast = q.clamp(min=torch.finfo(q.dtype).tiny).log()
    return Decay(
        torch.where(loss < 0.5, slow, fast), loss, p * parameters.beta.to(dtype), gamma * gamma.shape[1] ** -0.5
    )


def powers(log_q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``coarse (D, A, N)`` and ``fine (D, C, N)``: ``q^(a C + c) = coarse[a] * fine[c]``, A * C at least ``count``.

    Two factors cost about 2 sqrt(count) exponentials and memory, where the plain table of powers costs ``count``.
    """
    width = 1 << ((max(count, 1) - 1).bit_length() + 1) // 2
    rows = -(-count // width)
    fine = torch.arange(width, device=log_q.device, dtype=log_q.dtype)
    coarse = torch.arange(rows, device=log_q.device, dtype=log_q.dtype) * width
    return torch.exp(log_q[:, None] * coarse[:, None]), torch.exp(log_q[:, None] * fine[:, None])


def kernel(decay: Decay, taps: int) -> Tensor:
    """``(D, taps)``: k[j] = sum_n read * drive * q^j."""
    coarse, fine = powers(decay.log_q, taps)
    weighted = coarse * (decay.read * decay.drive)[:, None]
    return torch.bmm(weighted, fine.transpose(1, 2)).flatten(1)[:, :taps]
