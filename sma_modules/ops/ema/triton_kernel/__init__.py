"""Kernels of the moving average: a chunked scan. README.md derives it.

A program owns ``BLOCK`` channels, one per thread, and all N states of each: its tensors ``(N, BLOCK)`` lie in the
registers of single threads, and the sum over the states needs no other thread. It walks over chunks of tokens, the
same channels in many sequences and places, ``STEP`` tokens at a time, while the next ``STEP`` are on their way.

What is kept for states lies as ``(..., blocks, N, BLOCK)``, blocks = ceil(D / BLOCK), N padded to a power of two: the
places of a thread's states are then at distances known when it is compiled, and one address is enough for all of them.
So are those of neighbouring tokens, as the width ``DIM`` is a constant too. Places of channels that there are not
hold zeros. ``table (8, directions, blocks, N, BLOCK)`` holds the coefficients in the order of the names in ``shared``.
"""

from sma_modules.ops.ema.triton_kernel.chunks import carry, chunk_sums, prepare
from sma_modules.ops.ema.triton_kernel.gradient import backward, finish, through_activation
from sma_modules.ops.ema.triton_kernel.scan import forward
from sma_modules.ops.ema.triton_kernel.window import window_end, window_sums

__all__ = [
    "backward",
    "carry",
    "chunk_sums",
    "finish",
    "forward",
    "prepare",
    "through_activation",
    "window_end",
    "window_sums",
]
