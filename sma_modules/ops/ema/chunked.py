"""The causal moving average as matrix products over chunks of the sequence, with states handed from chunk to chunk.

For a CPU: per token and channel it costs ``2 C + 4 N`` multiplications and additions for chunks of C tokens and N
states, all of them in matrix products. README.md has the derivation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sma.ops.backend import without_autocast

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
    steps = torch.arange(CHUNK + 1, device=x.device, dtype=x.dtype)
    powers = F.threshold(torch.exp(log_q[:, None] * steps[:, None]), NEGLIGIBLE, 0.0)  # (D, C + 1, N)
    taps = torch.bmm(powers[:, :-1], weight[..., None])[..., 0]
    if direct is not None:
        taps = torch.cat([taps[:, :1] + direct[:, None], taps[:, 1:]], 1)
    out_of = (powers[:, 1:] * weight[:, None]).transpose(1, 2)
    length, missing = x.shape[1], -x.shape[1] % CHUNK
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    y: Tensor = _Chunked.apply(padded, taps, powers[:, :-1].flip(1), out_of, powers[:, -1])  # type: ignore[no-untyped-call]
    return y[:, :length] if missing else y


class _Chunked(torch.autograd.Function):
    """The large part, by hand to keep every large tensor contiguous. Chunks are the rows of ``(D, B * chunks, C)``.

    Arguments: ``x (B, chunks * C, D)``; ``taps (D, C)``, what a token gives to those after it in its chunk; ``into
    (D, C, N)``, what it gives to the state that leaves the chunk; ``out_of (D, N, C)``, what the state that enters a
    chunk gives to its tokens; ``fade (D, N)``, what a chunk leaves of that state.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, into: Tensor, out_of: Tensor, fade: Tensor) -> Tensor:
        rows, within = _to_rows(x), _toeplitz(taps)
        entering = _handed_on(torch.bmm(rows, into), fade, x.shape[0])
        ctx.save_for_backward(rows, within, into, out_of, fade, entering)
        return _from_rows(torch.bmm(rows, within).baddbmm_(entering, out_of), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(grad.device):  # somebody may call this inside of it
            return _gradients(grad, *ctx.saved_tensors)


def _gradients(
    grad: Tensor, rows: Tensor, within: Tensor, into: Tensor, out_of: Tensor, fade: Tensor, entering: Tensor
) -> tuple[Tensor, ...]:
    grad_rows = _to_rows(grad)
    # The gradient of the states is handed on in the other direction.
    leaving = _handed_on(torch.bmm(grad_rows, out_of.transpose(1, 2)), fade, grad.shape[0], back=True)
    grad_x = torch.bmm(grad_rows, within.transpose(1, 2)).baddbmm_(leaving, into.transpose(1, 2))
    return (
        _from_rows(grad_x, grad),
        _diagonals(torch.bmm(rows.transpose(1, 2), grad_rows)),
        torch.bmm(rows.transpose(1, 2), leaving),
        torch.bmm(entering.transpose(1, 2), grad_rows),
        (leaving * entering).sum(1),
    )


def _to_rows(x: Tensor) -> Tensor:
    """``(B, L, D)`` to ``(D, B * chunks, C)``."""
    return x.reshape(-1, x.shape[2]).t().contiguous().view(x.shape[2], -1, CHUNK)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_to_rows`."""
    return rows.view(rows.shape[0], -1).t().contiguous().view(like.shape)


def _handed_on(given: Tensor, fade: Tensor, batch: int, back: bool = False) -> Tensor:
    """The states that enter each chunk, from what each chunk gives, both ``(D, B * chunks, N)``.

    They go from the first chunk of a sequence to its last, or ``back``.
    """
    entering = torch.empty_like(given)
    steps = [each.view(given.shape[0], batch, -1, given.shape[2]).unbind(2) for each in (given, entering)]
    gives, enters = (each[::-1] for each in steps) if back else steps
    factor = fade[:, None]
    enters[0].zero_()
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
