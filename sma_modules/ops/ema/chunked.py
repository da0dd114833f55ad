"""The causal moving average as matrix products over chunks of the sequence, with states handed from chunk to chunk.

For a CPU: per token and channel it costs ``2 C + 4 N`` multiplications and additions for chunks of C tokens and N
states, all of them in matrix products. README.md has the derivation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.ops.backend import without_autocast
from sma.transforms import once_differentiable

CHUNK = 32
"""Tokens of a chunk: more make the products larger, fewer make more steps from chunk to chunk."""
NEGLIGIBLE = 1e-35
"""Powers of q below this are taken as zero: smaller numbers are near those that processors are slow with."""


def chunked(x: Tensor, log_q: Tensor, weight: Tensor, direct: Tensor | None) -> Tensor:
    """``y_t = direct * x_t + sum_n weight[n] * sum_j q[n]^j x_{t-j}`` per channel. Differentiable once.

    Args:
        x: ``(B, L, D)``, float32 or float64.
        log_q: ``(D, N)``.
        weight: ``(D, N)``.
        direct: ``(D,)``, or None for 0.

    Returns:
        ``(B, L, D)``.
    """
    length, missing = x.shape[1], -x.shape[1] % CHUNK
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    y: Tensor = _Chunked.apply(padded, log_q, weight, direct)  # type: ignore[no-untyped-call]
    return y[:, :length] if missing else y


@torch.no_grad()
def chunked_stream(x: Tensor, log_q: Tensor, drive: Tensor, read: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The same from a state on, without ``direct``, and without a gradient: ``S_t = q S_{t-1} + drive x_t``, of which
    ``y_t = sum_n read S_t``.

    Args:
        x: ``(B, L, D)``, float32 or float64, L at least 1.
        log_q: ``(D, N)``.
        drive: ``(D, N)``.
        read: ``(D, N)``.
        hidden: ``(B, D, N)``, the state before.

    Returns:
        ``(B, L, D)``, and the state after ``(B, D, N)``.
    """
    batch, length, dim = x.shape
    padded = F.pad(x, (0, 0, 0, -length % CHUNK))
    powers = _powers(log_q)
    taps = torch.bmm(powers[:, :-1], (drive * read)[..., None])[..., 0]
    into = (powers[:, :-1] * drive[:, None]).flip(1)
    out_of = (powers[:, 1:] * read[:, None]).transpose(1, 2)
    rows, before = _to_rows(padded), hidden.transpose(0, 1)
    entering = _handed_on(torch.bmm(rows, into), powers[:, -1], batch, before)
    y = _from_rows(torch.bmm(rows, _toeplitz(taps)).baddbmm_(entering, out_of), padded)[:, :length]
    # The last chunk by itself, as far as it goes.
    rest = (length - 1) % CHUNK + 1
    last, enters = (each.view(dim, batch, -1, each.shape[2])[:, :, -1] for each in (rows, entering))
    after = torch.bmm(last[:, :, :rest], into[:, CHUNK - rest :])
    return y, after.addcmul_(enters, powers[:, rest, None]).transpose(0, 1).contiguous()


class _Chunked(torch.autograd.Function):
    """By hand to keep large tensors contiguous and small ones few. Chunks are the rows of ``(D, B * chunks, C)``.

    In between there are ``taps (D, C)``, what a token gives to those after it in its chunk; ``into (D, C, N)``, what it
    gives to the state that leaves the chunk; ``out_of (D, N, C)``, what the state that enters a chunk gives to its
    tokens; ``fade (D, N)``, what a chunk leaves of that state. All of them are ``powers (D, C + 1, N)`` of q, times
    ``weight``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_q: Tensor, weight: Tensor, direct: Tensor | None) -> Tensor:
        powers = _powers(log_q)
        taps = torch.bmm(powers[:, :-1], weight[..., None])[..., 0]
        if direct is not None:
            taps[:, 0] += direct
        into, out_of = powers[:, :-1].flip(1), (powers[:, 1:] * weight[:, None]).transpose(1, 2)
        rows, within = _to_rows(x), _toeplitz(taps)
        entering = _handed_on(torch.bmm(rows, into), powers[:, -1], x.shape[0])
        ctx.save_for_backward(rows, within, into, out_of, entering, powers, weight)
        return _from_rows(torch.bmm(rows, within).baddbmm_(entering, out_of), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, within, into, out_of, entering, powers, weight = ctx.saved_tensors
        with without_autocast(grad.device):  # the backward pass may run under autocast
            grad_rows, fade = _to_rows(grad), powers[:, -1]
            # The gradient of the states is handed on in the other direction.
            leaving = _handed_on(torch.bmm(grad_rows, out_of.transpose(1, 2)), fade, grad.shape[0], back=True)
            grad_x = torch.bmm(grad_rows, within.transpose(1, 2)).baddbmm_(leaving, into.transpose(1, 2))
            by_taps = _diagonals(torch.bmm(rows.transpose(1, 2), grad_rows))
            by_into = torch.bmm(rows.transpose(1, 2), leaving).flip(1)
            by_out_of = torch.bmm(grad_rows.transpose(1, 2), entering)  # (D, C, N)
            # Each power, but for the first and the last, has a part in all three.
            by_weight = torch.bmm(by_taps[:, None], powers[:, :-1])[:, 0] + (by_out_of * powers[:, 1:]).sum(1)
            by_powers = F.pad(by_into.baddbmm_(by_taps[..., None], weight[:, None]), (0, 0, 0, 1))
            by_powers[:, 1:].addcmul_(by_out_of, weight[:, None])
            by_powers[:, -1] += (leaving * entering).sum(1)
            exponents = torch.arange(CHUNK + 1, device=grad.device, dtype=grad.dtype)[:, None]
            by_log_q = by_powers.mul_(powers).mul_(exponents).sum(1)
        return _from_rows(grad_x, grad), by_log_q, by_weight, by_taps[:, 0] if ctx.needs_input_grad[3] else None


def _powers(log_q: Tensor) -> Tensor:
    """``(D, C + 1, N)``: q to the powers 0..C."""
    exponents = torch.arange(CHUNK + 1, device=log_q.device, dtype=log_q.dtype)[:, None]
    return F.threshold(torch.exp(log_q[:, None] * exponents), NEGLIGIBLE, 0.0)


def _to_rows(x: Tensor) -> Tensor:
    """``(B, L, D)`` to ``(D, B * chunks, C)``."""
    return x.reshape(-1, x.shape[2]).t().contiguous().view(x.shape[2], -1, CHUNK)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_to_rows`."""
    return rows.view(rows.shape[0], -1).t().contiguous().view(like.shape)


def _handed_on(given: Tensor, fade: Tensor, batch: int, first: Tensor | None = None, back: bool = False) -> Tensor:
    """The states that enter each chunk, from what each chunk gives, both ``(D, B * chunks, N)``.

    They go from the first chunk of a sequence, which ``first (D, B, N)`` enters or nothing, to its last, or ``back``.
    """
    entering, shape = torch.empty_like(given), (given.shape[0], batch, -1, given.shape[2])
    gives, enters = given.view(shape).unbind(2), entering.view(shape).unbind(2)
    if back:
        gives, enters = gives[::-1], enters[::-1]
    factor = fade[:, None]
    if first is None:
        enters[0].zero_()
    else:
        enters[0].copy_(first)
    for gift, state, following in zip(gives, enters, enters[1:], strict=False):
        torch.addcmul(gift, state, factor, out=following)
    return entering


def _toeplitz(taps: Tensor) -> Tensor:
    """``(D, C)`` to ``(D, C, C)``: ``taps[i - j]`` at row j, column i, and zeros below the diagonal."""
    shifted = F.pad(taps, (CHUNK, 0)).as_strided((taps.shape[0], CHUNK, CHUNK), (2 * CHUNK, 1, 1), 1)
    return shifted.flip(1)


def _diagonals(matrix: Tensor) -> Tensor:
    """The transpose of :func:`_toeplitz`: sums along the diagonals, ``(D, C)``."""
    # Rows of 2 C numbers, read as rows of 2 C - 1, are each shifted by one against the row before.
    shifted = F.pad(matrix.flip(1), (0, CHUNK)).flatten(1)[:, : CHUNK * (2 * CHUNK - 1)]
    return shifted.reshape(-1, CHUNK, 2 * CHUNK - 1)[..., CHUNK - 1 :].sum(1)
