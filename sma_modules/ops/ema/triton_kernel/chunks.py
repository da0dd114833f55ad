"""Coefficients, the sums at the end of every chunk, and the states at the beginning of the next."""

from __future__ import annotations

import triton
import triton.language as tl

from sma_modules.ops.ema.triton_kernel.shared import (
    CHUNK_LOSS,
    CHUNK_SLOPE,
    CORRECTION,
    DRIVE,
    LEAVING,
    LEAVING_SLOPE,
    ONE_CHANNEL_EACH,
    WEIGHT,
    Q,
    coefficient,
    load_tokens,
    longest_reach,
    place_of,
    sigmoid64,
    sum_at,
)


@triton.jit
def prepare(
    delta, alpha, beta, gamma, table, reach,
    dim, n_state, read_scale, chunk, taps,
    STREAM: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Coefficients, in float64 because powers of q near 1 are worthless otherwise; and each channel's reach.

    The reach of a channel is the number of tokens after which even its slowest state is below 2^-40 of what it was.
    """
    direction = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    states = tl.arange(0, N)
    real = (states < n_state)[:, None] & (columns < dim)[None, :]
    at = (direction * dim + columns)[None, :] * n_state + states[:, None]
    d = tl.load(delta + at, mask=real, other=0.0).to(tl.float32).to(tl.float64)
    a = tl.load(alpha + at, mask=real, other=0.0).to(tl.float32).to(tl.float64)
    p = sigmoid64(d)
    # 1 - p a without cancellation; the floor keeps its logarithm finite.
    q = sigmoid64(-d) + p * sigmoid64(-a)
    log_q = tl.log(tl.maximum(q, 1e-300))
    rounded = q.to(tl.float32)
    drift = tl.where(rounded > 0.5, log_q - tl.log(tl.maximum(rounded.to(tl.float64), 0.5)), 0.0)
    correction = tl.exp(drift * TILE) - 1.0
    drive = p * tl.load(beta + at, mask=real, other=0.0).to(tl.float32).to(tl.float64)
    weight = tl.load(gamma + at, mask=real, other=0.0).to(tl.float32).to(tl.float64) * read_scale
    if not STREAM:
        weight = weight * drive
    slot = direction * tl.num_programs(1) + tl.program_id(1)
    out = table + slot * (N * BLOCK) + states[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    size = tl.num_programs(0) * tl.num_programs(1) * (N * BLOCK)
    tl.store(out + Q * size, tl.where(real, rounded, 0.0))
    tl.store(out + CORRECTION * size, tl.where(real, correction, 0.0).to(tl.float32))
    tl.store(out + WEIGHT * size, tl.where(real, weight, 0.0).to(tl.float32))
    tl.store(out + CHUNK_LOSS * size, tl.where(real, 1.0 - tl.exp(log_q * chunk), 1.0).to(tl.float32))
    tl.store(
        out + CHUNK_SLOPE * size,
        tl.where(real, chunk * tl.exp(log_q * (chunk - 1)), 0.0).to(tl.float32),
    )
    tl.store(out + LEAVING * size, tl.where(real, tl.exp(log_q * taps), 0.0).to(tl.float32))
    tl.store(
        out + LEAVING_SLOPE * size,
        tl.where(real, taps * tl.exp(log_q * (taps - 1)), 0.0).to(tl.float32),
    )
    tl.store(out + DRIVE * size, tl.where(real, drive, 0.0).to(tl.float32))
    steps = tl.minimum(27.725887222397812 / tl.maximum(-log_q, 1e-8) + 1.0, 1073741824.0)
    steps = tl.max(tl.where(real, steps.to(tl.float32), 0.0), axis=0)
    tl.store(reach + direction * dim + columns, steps.to(tl.int32), mask=columns < dim)


@triton.jit(do_not_specialize_on_alignment=ONE_CHANNEL_EACH)
def chunk_sums(
    source, lengths, table, reach, sums, length, skipped, chunks,
    LENGTHS: tl.constexpr, GRADIENT: tl.constexpr, DIRECTIONS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The sum at the end of every chunk: ``sum_j q^j u_j``, j tokens before its end (in the order of the scan).

    ``GRADIENT``: of the gradient in place of the input, in the opposite order, with the derivative by q beside it.
    ``skipped``: how many tokens come before those that the lengths count.
    """
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    item = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < DIM
    b = item // chunks
    j = item - b * chunks
    begin = j * CHUNK
    tiles = (tl.minimum(length - begin, CHUNK) + TILE - 1) // TILE
    row = source + b.to(tl.int64) * length * DIM + columns
    limit = length
    if LENGTHS:
        limit = tl.minimum(tl.load(lengths + b).to(tl.int32) + skipped, length)
    mine = tl.program_id(1) * (N * BLOCK)
    for direction in tl.static_range(DIRECTIONS):
        _chunk_sum(
            row, sums + mine, b, j, chunks, table + mine, reach, begin, tiles, limit, columns, inside, direction,
            (direction == 1) != GRADIENT, GRADIENT, DIRECTIONS, DIM, BLOCKS, N, BLOCK, TILE, STEP,
        )  # fmt: skip


@triton.jit
def _chunk_sum(
    row, sums, b, j, chunks, table, reach, begin, tiles, limit, columns, inside, direction: tl.constexpr,
    REVERSE: tl.constexpr, GRADIENT: tl.constexpr, DIRECTIONS: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One direction of one chunk. Tokens that contribute nothing at its end are skipped."""
    q = coefficient(table, Q, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    correction = coefficient(table, CORRECTION, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    PARTS: tl.constexpr = TILE // STEP
    needed = (longest_reach(reach, direction, DIM, columns, inside) + TILE - 1) // TILE
    s = tl.zeros((N, BLOCK), tl.float32)
    h = tl.zeros((N, BLOCK), tl.float32)
    steps = tiles * PARTS
    start = tl.maximum(tiles - needed, 0) * PARTS
    coming = load_tokens(row, begin + place_of(start, steps, REVERSE, STEP), limit, inside, DIM, REVERSE, STEP)
    for k in range(start, steps):
        xs = coming
        coming = load_tokens(row, begin + place_of(k + 1, steps, REVERSE, STEP), limit, inside, DIM, REVERSE, STEP)
        if k % PARTS == 0:
            s = s + s * correction
            if GRADIENT:
                h = h + h * correction
        for i in tl.static_range(STEP):
            if GRADIENT:
                h = h * q + s
            s = s * q + xs[i][None, :]
    PAIR: tl.constexpr = 2 if GRADIENT else 1
    out = sum_at(sums, b, j, chunks, direction, BLOCKS, DIRECTIONS, PAIR, N, BLOCK)
    tl.store(out, s)
    if GRADIENT:
        tl.store(out + BLOCKS * N * BLOCK, h)


@triton.jit
def carry(
    sums, table, hidden, dim, blocks, chunks, n_state,
    STREAM: tl.constexpr, CARRIED: tl.constexpr, GRADIENT: tl.constexpr, DIRECTIONS: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Turns the sums of the chunks into the states at their beginnings, in place. Without truncation only.

    ``hidden (B, D, n_state)`` is the state before the first chunk of a stream.
    """
    b = tl.program_id(0) // DIRECTIONS
    direction = tl.program_id(0) % DIRECTIONS
    size = blocks * (N * BLOCK)
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = place < size
    field = DIRECTIONS * size
    at = table + direction * size + place
    loss = tl.load(at + CHUNK_LOSS * field, mask=inside, other=0.0)
    slope = tl.load(at + CHUNK_SLOPE * field, mask=inside, other=0.0)
    drive = tl.load(at + DRIVE * field, mask=inside, other=0.0)
    PAIR: tl.constexpr = 2 if GRADIENT else 1
    stride = DIRECTIONS * PAIR * size
    start = sums + (b.to(tl.int64) * chunks * DIRECTIONS + direction) * (PAIR * size) + place
    reverse = direction == (0 if GRADIENT else 1)
    s = tl.zeros((WIDTH,), tl.float32)
    h = tl.zeros((WIDTH,), tl.float32)
    if CARRIED:
        n = place // BLOCK % N
        column = place // (N * BLOCK) * BLOCK + place % BLOCK
        at = hidden + (b.to(tl.int64) * dim + column) * n_state + n
        s = tl.load(at, mask=inside & (n < n_state) & (column < dim), other=0.0)
    for base in range(0, chunks, AHEAD):
        added = ()
        slopes = ()
        for i in tl.static_range(AHEAD):
            j = tl.where(reverse, chunks - 1 - base - i, base + i).to(tl.int64)
            mask = inside & (base + i < chunks)
            added = added + (tl.load(start + j * stride, mask=mask, other=0.0),)
            if GRADIENT:
                slopes = slopes + (tl.load(start + j * stride + size, mask=mask, other=0.0),)
        for i in tl.static_range(AHEAD):
            j = tl.where(reverse, chunks - 1 - base - i, base + i).to(tl.int64)
            mask = inside & (base + i < chunks)
            tl.store(start + j * stride, s, mask=mask)
            if GRADIENT:
                tl.store(start + j * stride + size, h, mask=mask)
                h = h - loss * h + slope * s + slopes[i]
            if STREAM:
                s = s - loss * s + drive * added[i]
            else:
                s = s - loss * s + added[i]
