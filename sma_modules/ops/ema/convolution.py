"""Long convolution of every channel with a kernel of its own, by Fourier transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.transforms import transformed

DIRECT = 1 << 21
"""Tokens times taps up to which an exported graph takes products and sums: runtimes differ in their transforms."""
BLOCK_ELEMENTS = 1 << 19
"""On a CPU, channels are transformed in blocks of about this many numbers, which stay in the cache."""


def convolve(x: Tensor, ahead: Tensor, behind: Tensor | None = None) -> Tensor:
    """``y_t = sum_j ahead[j] x_{t-j} + sum_j behind[j] x_{t+j}`` per channel.

    Args:
        x: ``(B, L, D)``, float32 or float64, taken as zero outside 0..L-1.
        ahead: ``(D, K)`` kernel on the present and the past.
        behind: ``(D, K)`` kernel on the present and the future.

    Returns:
        ``(B, L, D)``.
    """
    length, taps = x.shape[1], ahead.shape[1]
    if torch.compiler.is_exporting() and length * taps <= DIRECT:
        return _direct(x, ahead, behind)
    # Space for the tail of the kernel on one side; when circular, both sides may share it because x is zero there.
    size = fast_size(length + taps - 1)
    if behind is None:
        circular = torch.nn.functional.pad(ahead, (0, size - taps))
    else:
        middle = ahead.new_zeros(ahead.shape[0], size - 2 * taps + 1)
        circular = torch.cat([ahead[:, :1] + behind[:, :1], ahead[:, 1:], middle, behind[:, 1:].flip(1)], dim=1)
    if transformed():
        return _plain(x, circular)
    y: Tensor = _CircularConvolution.apply(x, circular)  # type: ignore[no-untyped-call]
    return y


def _direct(x: Tensor, ahead: Tensor, behind: Tensor | None) -> Tensor:
    """The same without transforms."""
    taps = ahead.shape[1]
    kernel = ahead.flip(1)
    if behind is not None:
        kernel = torch.cat([kernel[:, :-1], kernel[:, -1:] + behind[:, :1], behind[:, 1:]], 1)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (taps - 1, 0 if behind is None else taps - 1))
    return torch.nn.functional.conv1d(padded, kernel[:, None], groups=x.shape[2]).transpose(1, 2)


def fast_size(minimum: int) -> int:
    """The smallest even ``2^a 3^b 5^c`` that is at least ``minimum``: sizes that Fourier transforms are fast for."""
    best = 1 << max(minimum - 1, 1).bit_length()
    five = 1
    while five < best:
        odd = five
        while odd < best:
            size = odd << max((-(-minimum // odd) - 1).bit_length(), 1)
            best = min(best, size)
            odd *= 3
        five *= 5
    return best


class _CircularConvolution(torch.autograd.Function):
    """Circular convolution of ``x (B, L, D)``, zero-padded to n, with ``kernel (D, n)``; the first L outputs.

    Written by hand because it keeps only x and the kernel for the backward pass, not spectra twice their size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block in _blocks(x, kernel):
            spectrum = _spectrum(x, kernel, block).mul_(torch.fft.rfft(kernel[block]))
            y[..., block] = _signal(spectrum, x, kernel)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, kernel) = grads, ctx.saved_tensors
        need_x, need_kernel = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative
            wanted = [each for each, needed in ((x, need_x), (kernel, need_kernel)) if needed]
            found = iter(torch.autograd.grad(_plain(x, kernel), wanted, grad, create_graph=True))
            return next(found) if need_x else None, next(found) if need_kernel else None
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
        grad_kernel = torch.empty_like(kernel) if need_kernel else None
        for block in _blocks(x, kernel):
            spectrum = _spectrum(grad, kernel, block)
            if grad_kernel is not None:
                correlation = _spectrum(x, kernel, block).conj_physical_().mul_(spectrum).sum(0)
                grad_kernel[block] = torch.fft.irfft(correlation, n=kernel.shape[1])
            if grad_x is not None:
                spectrum.mul_(torch.fft.rfft(kernel[block]).conj_physical_())
                grad_x[..., block] = _signal(spectrum, x, kernel)
        return grad_x, grad_kernel


def _plain(x: Tensor, kernel: Tensor) -> Tensor:
    """The same by operations that PyTorch differentiates, as often as is asked for."""
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=kernel.shape[1]) * torch.fft.rfft(kernel)
    return _signal(spectrum, x, kernel)


def _blocks(x: Tensor, kernel: Tensor) -> list[slice]:
    dim = x.shape[2]
    if x.device.type != "cpu":
        return [slice(0, dim)]
    width = max(8, BLOCK_ELEMENTS // (x.shape[0] * kernel.shape[1]))
    return [slice(first, min(first + width, dim)) for first in range(0, dim, width)]


def _spectrum(x: Tensor, kernel: Tensor, block: slice) -> Tensor:
    """``(B, block, n // 2 + 1)`` complex."""
    spectrum: Tensor = torch.fft.rfft(x[..., block].transpose(1, 2), n=kernel.shape[1])
    return spectrum


def _signal(spectrum: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """``(B, L, block)``."""
    signal: Tensor = torch.fft.irfft(spectrum, n=kernel.shape[1])
    return signal[..., : x.shape[1]].transpose(1, 2)
