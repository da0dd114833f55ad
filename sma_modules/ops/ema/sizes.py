"""Sizes of the launches: what can be tuned, and how the work is cut up among programs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
"""Channels of a program, one per thread."""
TILE = 16
"""Tokens of a tile; chunks are made of whole tiles."""
SUM_STEP = 8
FORWARD_STEP = 4
BACKWARD_STEP = 4
"""Tokens whose loads are on their way together, in multiples of 4; they take registers, twice, as the next are loaded
before these are used."""
PLACES = 512
"""Channels of four tokens each for a program of what comes before the activation."""
CHUNK = 128
"""Tokens of a chunk by default: short enough for what a bidirectional program keeps of it
to stay in the cache, long enough for the states between chunks (N / CHUNK numbers per input) to cost little."""
MINIMUM_CHUNK = 32
FORWARD_REGISTERS = 96
BACKWARD_REGISTERS = 168
"""Of a thread, as few as its states fit in: of 128 a scheduler has enough for 4 warps, of 168 for 3 and of 96 for 5."""
LARGE_FORWARD_REGISTERS = 168
LARGE_BACKWARD_REGISTERS = 255
"""The same where something leaves the window or a stream's state is kept: one or two more numbers for every state."""
WARPS_PER_PROCESSOR = 12
"""Chunks are shortened where there would be fewer than these, of 32 channels each, for a multiprocessor."""
SCHEDULERS, REGISTER_FILE = 4, 16384
"""Of a multiprocessor, and registers of one: as many programs (of one warp) are started as those are enough for."""
PROCESSORS = 132
"""Of the device, where it does not say."""


class Plan(NamedTuple):
    """How the work is cut up.

    Attributes:
        chunk: tokens of a chunk.
        chunks: of a sequence.
        blocks: of channels.
        programs: of a block of channels.
        states: N, padded to a power of two.
        taps: tokens that an output depends on at most.
        window: whether these are fewer than the tokens.
    """

    chunk: int
    chunks: int
    blocks: int
    programs: int
    states: int
    taps: int
    window: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Programs per block of channels, and blocks of channels."""
        return self.blocks, self.programs


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def plan(x: Tensor, n_state: int, truncation: int | None, registers: int) -> Plan:
    """Sizes for ``x (B, L, D)`` and programs of so many registers. Forward and backward pass agree on the chunks."""
    processors = _processors(x.device.index or 0) if x.is_cuda else PROCESSORS
    return _plan(*x.shape, n_state, truncation, registers, processors, CHUNK, MINIMUM_CHUNK)


@functools.lru_cache(maxsize=1024)
def _plan(
    batch: int,
    length: int,
    dim: int,
    n_state: int,
    truncation: int | None,
    registers: int,
    processors: int,
    chunk: int,
    minimum: int,
) -> Plan:
    """Chunks are halved while there are too few of them to occupy the device.

    With truncation their size then moves a little, to the one whose multiple exceeds the window by the fewest tokens:
    those are taken out of every start state one by one.
    """
    blocks, wanted = -(-dim // BLOCK), processors * WARPS_PER_PROCESSOR
    while chunk > minimum and batch * blocks * -(-length // chunk) < wanted:
        chunk //= 2
    taps = length if truncation is None else min(truncation, length)
    if taps < length:
        sizes = range(max(chunk * 3 // 4 // TILE, 1) * TILE, chunk * 3 // 2 + 1, TILE)
        chunk = min(sizes, key=lambda size: (-taps % size, abs(size - chunk)))
    chunks = -(-length // chunk)
    warps = REGISTER_FILE // (32 * registers) * SCHEDULERS * processors
    programs = max(min(batch * chunks, warps // blocks), 1)
    return Plan(chunk, chunks, blocks, programs, 1 << (n_state - 1).bit_length(), taps, taps < length)
