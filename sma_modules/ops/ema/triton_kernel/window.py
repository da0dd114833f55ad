"""The state after a chunk of a truncated stream: its last inputs, and their sum."""

from __future__ import annotations

import triton
import triton.language as tl

from sma_modules.ops.ema.triton_kernel.shared import (
    CHUNK_LOSS,
    CORRECTION,
    DRIVE,
    ONE_CHANNEL_EACH,
    Q,
    coefficient,
    sum_at,
)


@triton.jit(do_not_specialize_on_alignment=ONE_CHANNEL_EACH)
def window_sums(
    x, lengths, history, table, sums, length, past, taps, chunks,
    LENGTHS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Keeps the last ``taps`` of the ``past`` and then ``lengths`` tokens, and sums every chunk of them.

    The last chunk ends where the window ends; what of the first lies before it counts as zero.
    """
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    item = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < DIM
    b = item // chunks
    j = item - b * chunks
    end = length
    if LENGTHS:
        end = past + tl.minimum(tl.maximum(tl.load(lengths + b), 0), length - past).to(tl.int32)
    row = x + b.to(tl.int64) * length * DIM + columns
    kept = history + b.to(tl.int64) * taps * DIM + columns
    mine = tl.program_id(1) * (N * BLOCK)
    q = coefficient(table + mine, Q, 0, BLOCKS, 1, N, BLOCK)
    s = tl.zeros((N, BLOCK), tl.float32)
    begin = taps - (chunks - j) * CHUNK
    for k in tl.range(0, CHUNK // STEP, disable_licm=True):
        first = begin + k * STEP
        tokens = ()
        for i in tl.static_range(STEP):
            t = end - taps + first + i
            tokens = tokens + (tl.load(row + t * DIM, mask=inside & (first + i >= 0) & (t >= 0), other=0.0),)
        if k % (TILE // STEP) == 0:
            s = s + s * coefficient(table + mine, CORRECTION, 0, BLOCKS, 1, N, BLOCK)
        for i in tl.static_range(STEP):
            tl.store(kept + (first + i) * DIM, tokens[i], mask=inside & (first + i >= 0))
            s = s * q + tokens[i].to(tl.float32)[None, :]
    tl.store(sum_at(sums + mine, b, j, chunks, 0, BLOCKS, 1, 1, N, BLOCK), s)


@triton.jit(do_not_specialize_on_alignment=ONE_CHANNEL_EACH)
def window_end(
    sums, table, lengths, hidden, fresh, count, hidden_end, fresh_end, count_end, dim, blocks, chunks, n_state,
    LENGTHS: tl.constexpr, CARRIED: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The states after the chunks of ``window_sums``; rows without new tokens keep theirs."""
    b = tl.program_id(0).to(tl.int64)
    size = blocks * (N * BLOCK)
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = place < size
    loss = tl.load(table + CHUNK_LOSS * size + place, mask=inside, other=0.0)
    drive = tl.load(table + DRIVE * size + place, mask=inside, other=0.0)
    s = tl.zeros((WIDTH,), tl.float32)
    for base in range(0, chunks, AHEAD):
        added = ()
        for i in tl.static_range(AHEAD):
            at = sums + (b * chunks + base + i) * size + place
            added = added + (tl.load(at, mask=inside & (base + i < chunks), other=0.0),)
        for i in tl.static_range(AHEAD):
            s = tl.where(base + i < chunks, s - loss * s + added[i], s)
    n = place // BLOCK % N
    column = place // (N * BLOCK) * BLOCK + place % BLOCK
    real = inside & (n < n_state) & (column < dim)
    at = (b * dim + column) * n_state + n
    s = s * drive
    newer = tl.zeros((WIDTH,), tl.float32)
    number = b * 0
    if LENGTHS and CARRIED:
        idle = tl.load(lengths + b) <= 0
        s = tl.where(idle, tl.load(hidden + at, mask=real & idle, other=0.0), s)
        newer = tl.load(fresh + at, mask=real & idle, other=0.0)
        number = tl.load(count + b, mask=idle, other=0)
    tl.store(hidden_end + at, s, mask=real)
    tl.store(fresh_end + at, newer, mask=real)
    if tl.program_id(1) == 0:
        tl.store(count_end + b, number)
