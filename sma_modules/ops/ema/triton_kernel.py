"""Kernels of the moving average: a chunked scan. README.md derives it.

A program owns ``BLOCK`` channels, one per thread, and all N states of each: its tensors ``(N, BLOCK)`` lie in the
registers of single threads, and the sum over the states needs no other thread. It walks over chunks of tokens, the
same channels in many sequences and places, ``STEP`` tokens at a time, while the next ``STEP`` are on their way.

What is kept for states lies as ``(..., blocks, N, BLOCK)``, blocks = ceil(D / BLOCK), N padded to a power of two: the
places of a thread's states are then at distances known when it is compiled, and one address is enough for all of them.
So are those of neighbouring tokens, as the width ``DIM`` is a constant too. Places of channels that there are not
hold zeros. ``table (8, directions, blocks, N, BLOCK)`` holds the coefficients in the order of the names below.
"""

from __future__ import annotations

import triton
import triton.language as tl

Q = tl.constexpr(0)  # decay, rounded to float32
CORRECTION = tl.constexpr(1)  # (true q / rounded q)^TILE - 1
WEIGHT = tl.constexpr(2)  # of a state in the output
CHUNK_LOSS = tl.constexpr(3)  # 1 - q^CHUNK
CHUNK_SLOPE = tl.constexpr(4)  # d q^CHUNK / dq
LEAVING = tl.constexpr(5)  # q^taps
LEAVING_SLOPE = tl.constexpr(6)  # d q^taps / dq
DRIVE = tl.constexpr(7)  # weight of an input in a state, where states carry it

ONE_CHANNEL_EACH = ("table", "sums", "hidden", "hidden_end", "partial")
"""What is read or written as ``(N, BLOCK)``. If the compiler knew these addresses to be multiples of 16 bytes it would
give four neighbouring channels to one thread, to move them together, and spread the states over several threads, which
would then have to talk to each other in the innermost loop."""


@triton.jit
def _sigmoid64(x):
    return 1.0 / (1.0 + tl.exp(-tl.minimum(tl.maximum(x, -700.0), 700.0)))


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _silu_slope(x):
    s = tl.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


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
    p = _sigmoid64(d)
    # 1 - p a without cancellation; the floor keeps its logarithm finite.
    q = _sigmoid64(-d) + p * _sigmoid64(-a)
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


@triton.jit
def _states(N: tl.constexpr, BLOCK: tl.constexpr):
    """Places ``(N, BLOCK)`` of a block's states."""
    return tl.arange(0, N)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _coefficient(
    table, field, direction, BLOCKS: tl.constexpr, DIRECTIONS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    """``(N, BLOCK)`` of the table, which begins with this program's block."""
    return tl.load(table + (field * DIRECTIONS + direction) * (BLOCKS * N * BLOCK) + _states(N, BLOCK))


@triton.jit
def _reach(reach, direction, dim, columns, inside):
    return tl.max(tl.load(reach + direction * dim + columns, mask=inside, other=0), axis=0)


@triton.jit
def _leaves(reach, taps, dim, columns, inside, DIRECTIONS: tl.constexpr):
    """Whether anything is left, in any direction, of a token that leaves the window."""
    longest = _reach(reach, 0, dim, columns, inside)
    if DIRECTIONS == 2:
        longest = tl.maximum(longest, _reach(reach, 1, dim, columns, inside))
    return longest > taps


@triton.jit
def _token(row, t, limit, inside, DIM: tl.constexpr):
    """``(BLOCK,)`` float32: token t, zero outside 0..limit - 1. ``row (BLOCK,)`` points to token 0."""
    return tl.load(row + t * DIM, mask=inside & (t >= 0) & (t < limit), other=0.0).to(tl.float32)


@triton.jit
def _tokens(row, first, limit, inside, DIM: tl.constexpr, REVERSE: tl.constexpr, STEP: tl.constexpr):
    """The ``STEP`` tokens from ``first`` on, in the order of the scan: all loads on their way before any is used."""
    tokens = ()
    at = row + first * DIM
    for i in tl.static_range(STEP):
        place = STEP - 1 - i if REVERSE else i
        t = first + place
        value = tl.load(at + place * DIM, mask=inside & (t >= 0) & (t < limit), other=0.0)
        tokens = tokens + (value.to(tl.float32),)
    return tokens


@triton.jit
def _in_order(tokens, i: tl.constexpr, REVERSE: tl.constexpr, STEP: tl.constexpr):
    """Of a tuple in the order of the scan, the one that comes i-th in the sequence."""
    return tokens[STEP - 1 - i if REVERSE else i]


@triton.jit
def _keep(seed, b, place, dropout):
    """Whether dropout keeps the four tokens 4 g .. 4 g + 3 of sequence b, at ``place = g D + channel``."""
    zero = place * 0
    r0, r1, r2, r3 = tl.philox(seed, place, zero + b, zero, zero)
    least = ((zero.to(tl.float32) + dropout) * 4294967296.0).to(tl.uint32)
    return (
        r0.to(tl.uint32, bitcast=True) >= least,
        r1.to(tl.uint32, bitcast=True) >= least,
        r2.to(tl.uint32, bitcast=True) >= least,
        r3.to(tl.uint32, bitcast=True) >= least,
    )


@triton.jit
def _sum_at(
    sums, b, j, chunks, direction,
    BLOCKS: tl.constexpr, DIRECTIONS: tl.constexpr, PAIR: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pointers ``(N, BLOCK)`` into ``sums (B, chunks, directions, PAIR, blocks, N, BLOCK)``, from its block on."""
    place = ((b.to(tl.int64) * chunks + j) * DIRECTIONS + direction) * PAIR
    return sums + place * (BLOCKS * N * BLOCK) + _states(N, BLOCK)


@triton.jit
def through_activation(
    dy, pre, out, seed, length, dim, dropout, scale, SILU: tl.constexpr, DROPOUT: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The gradient before dropout and activation. A program takes ``PLACES`` channels of four tokens each."""
    total = tl.cdiv(length, 4) * dim
    programs = tl.cdiv(total, PLACES)
    b = tl.program_id(0) // programs
    place = (tl.program_id(0) - b * programs) * PLACES + tl.arange(0, PLACES)
    t = place // dim * 4
    at = b.to(tl.int64) * length * dim + t * dim + place % dim
    if DROPOUT:
        keeps = _keep(tl.load(seed), b, place, dropout)
    for i in tl.static_range(4):
        mask = (place < total) & (t + i < length)
        g = tl.load(dy + at + i * dim, mask=mask, other=0.0).to(tl.float32)
        # No gradient stays none, also where padding holds nan.
        if SILU:
            before = tl.load(pre + at + i * dim, mask=mask, other=0.0).to(tl.float32)
            g = tl.where(g == 0.0, 0.0, g * _silu_slope(before))
        if DROPOUT:
            g = tl.where(keeps[i], g * scale, 0.0)
        tl.store(out + at + i * dim, g, mask=mask)


@triton.jit(do_not_specialize_on_alignment=ONE_CHANNEL_EACH)
def chunk_sums(
    source, lengths, table, reach, sums, length, chunks,
    LENGTHS: tl.constexpr, GRADIENT: tl.constexpr, DIRECTIONS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What every chunk leaves behind: ``sum_j q^j u_j``, j tokens before its end (in the order of the scan).

    ``GRADIENT``: of the gradient in place of the input, in the opposite order, with the derivative by q beside it.
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
        limit = tl.minimum(tl.load(lengths + b).to(tl.int32), length)
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
    """One direction of one chunk. Tokens from which nothing is left at its end are passed over."""
    q = _coefficient(table, Q, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    correction = _coefficient(table, CORRECTION, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    PARTS: tl.constexpr = TILE // STEP
    needed = (_reach(reach, direction, DIM, columns, inside) + TILE - 1) // TILE
    s = tl.zeros((N, BLOCK), tl.float32)
    h = tl.zeros((N, BLOCK), tl.float32)
    steps = tiles * PARTS
    start = tl.maximum(tiles - needed, 0) * PARTS
    coming = _tokens(row, begin + _place(start, steps, REVERSE, STEP), limit, inside, DIM, REVERSE, STEP)
    for k in range(start, steps):
        xs = coming
        coming = _tokens(row, begin + _place(k + 1, steps, REVERSE, STEP), limit, inside, DIM, REVERSE, STEP)
        if k % PARTS == 0:
            s = s + s * correction
            if GRADIENT:
                h = h + h * correction
        for i in tl.static_range(STEP):
            if GRADIENT:
                h = h * q + s
            s = s * q + xs[i][None, :]
    PAIR: tl.constexpr = 2 if GRADIENT else 1
    out = _sum_at(sums, b, j, chunks, direction, BLOCKS, DIRECTIONS, PAIR, N, BLOCK)
    tl.store(out, s)
    if GRADIENT:
        tl.store(out + BLOCKS * N * BLOCK, h)


@triton.jit
def _place(k, steps, REVERSE: tl.constexpr, STEP: tl.constexpr):
    """First token, in the chunk, of the k-th of its steps in the order of the scan; outside behind the last."""
    return (steps - 1 - k if REVERSE else k) * STEP


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


@triton.jit
def _start(
    sums, table, row, b, j, limit, chunks, inside, direction: tl.constexpr, needed, taps,
    LEAVES: tl.constexpr, MANY: tl.constexpr, WINDOW: tl.constexpr, REVERSE: tl.constexpr, PAIR: tl.constexpr,
    DIRECTIONS: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """States at the beginning of chunk j, and, for a ``PAIR``, their derivatives by q.

    Without truncation they lie ready. With it they are summed over the chunks that the window reaches back to, less
    the oldest tokens that it no longer reaches.
    """
    s = tl.zeros((N, BLOCK), tl.float32)
    h = tl.zeros((N, BLOCK), tl.float32)
    SECOND: tl.constexpr = BLOCKS * N * BLOCK
    if MANY and not WINDOW:
        at = _sum_at(sums, b, j, chunks, direction, BLOCKS, DIRECTIONS, PAIR, N, BLOCK)
        s = tl.load(at)
        if PAIR == 2:
            h = tl.load(at + SECOND)
    if MANY and WINDOW:
        loss = _coefficient(table, CHUNK_LOSS, direction, BLOCKS, DIRECTIONS, N, BLOCK)
        whole = (taps + CHUNK - 1) // CHUNK
        back = tl.minimum(whole, (needed + CHUNK - 1) // CHUNK)
        back = tl.minimum(back, chunks - 1 - j if REVERSE else j)
        for i in range(back):
            other = j + back - i if REVERSE else j - back + i
            at = _sum_at(sums, b, other, chunks, direction, BLOCKS, DIRECTIONS, PAIR, N, BLOCK)
            if PAIR == 2:
                slope = _coefficient(table, CHUNK_SLOPE, direction, BLOCKS, DIRECTIONS, N, BLOCK)
                h = h - loss * h + slope * s + tl.load(at + SECOND)
            s = s - loss * s + tl.load(at)
        if LEAVES:
            q = _coefficient(table, Q, direction, BLOCKS, DIRECTIONS, N, BLOCK)
            old = tl.zeros((N, BLOCK), tl.float32)
            older = tl.zeros((N, BLOCK), tl.float32)
            for i in range(whole * CHUNK - taps):
                t = (j + 1 + whole) * CHUNK - 1 - i if REVERSE else (j - whole) * CHUNK + i
                if PAIR == 2:
                    older = older * q + old
                old = old * q + _token(row, t, limit, inside, DIM)[None, :]
            gone = _coefficient(table, LEAVING, direction, BLOCKS, DIRECTIONS, N, BLOCK)
            if PAIR == 2:
                slope = _coefficient(table, LEAVING_SLOPE, direction, BLOCKS, DIRECTIONS, N, BLOCK)
                h = h - gone * older - slope * old
            s = s - gone * old
    return s, h


@triton.jit
def _forward_sweep(
    s, x, y, pre, scratch, hidden_end, table, omega, seed,
    b, begin, tiles, limit, length, columns, inside, direction: tl.constexpr, taps, dropout, scale, n_state,
    LEAVES: tl.constexpr, LAST: tl.constexpr, LENGTHS: tl.constexpr, STREAM: tl.constexpr, SILU: tl.constexpr,
    DROPOUT: tl.constexpr, SAVE: tl.constexpr, DIRECTIONS: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One direction of one chunk. The last one adds what the first left in ``scratch`` and finishes the output."""
    REVERSE: tl.constexpr = direction == 1
    PARTS: tl.constexpr = TILE // STEP
    q = _coefficient(table, Q, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    weight = _coefficient(table, WEIGHT, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    if LEAVES:
        gone = _coefficient(table, LEAVING, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    if STREAM:
        drive = _coefficient(table, DRIVE, direction, BLOCKS, DIRECTIONS, N, BLOCK)
        end = s
    steps = tiles * PARTS
    # Only the direct path looks at padding.
    seen = length if LAST else limit
    back = taps if REVERSE else -taps
    local = _place(0, steps, REVERSE, STEP)
    xs = _tokens(x, begin + local, seen, inside, DIM, REVERSE, STEP)
    if LEAVES:
        olds = _tokens(x, begin + local + back, limit, inside, DIM, REVERSE, STEP)
    if direction == 1:
        before = _tokens(scratch, local, steps * STEP, inside, BLOCK, REVERSE, STEP)
    for k in tl.range(0, steps, disable_licm=True):
        first = begin + local
        local = _place(k + 1, steps, REVERSE, STEP)
        next_xs = _tokens(x, begin + local, seen, inside, DIM, REVERSE, STEP)
        if LEAVES:
            next_olds = _tokens(x, begin + local + back, limit, inside, DIM, REVERSE, STEP)
        if direction == 1:
            next_before = _tokens(scratch, local, steps * STEP, inside, BLOCK, REVERSE, STEP)
        if k % PARTS == 0:
            s = s + s * _coefficient(table, CORRECTION, direction, BLOCKS, DIRECTIONS, N, BLOCK)
        outs = ()
        for i in tl.static_range(STEP):
            t = first + (STEP - 1 - i if REVERSE else i)
            u = xs[i]
            if LENGTHS and LAST:
                u = tl.where(t < limit, u, 0.0)
            if STREAM:
                s = s * q + u[None, :] * drive
            else:
                s = s * q + u[None, :]
            if LEAVES:
                s = s - gone * olds[i][None, :]
            outs = outs + (tl.sum(s * weight, axis=0),)
            if STREAM:
                end = tl.where(t == limit - 1, s, end)
        if LAST:
            for group in tl.static_range(STEP // 4):
                if DROPOUT:
                    keeps = _keep(seed, b, (first // 4 + group) * DIM + columns, dropout)
                for i in tl.static_range(4):
                    place = group * 4 + i
                    value = _in_order(outs, group * 4 + i, REVERSE, STEP) + omega * _in_order(
                        xs, group * 4 + i, REVERSE, STEP
                    )
                    if direction == 1:
                        value = value + _in_order(before, group * 4 + i, REVERSE, STEP)
                    mask = inside & (first + place < length)
                    if SAVE:
                        tl.store(pre + first * DIM + place * DIM, value, mask=mask)
                    if SILU:
                        value = _silu(value)
                    if DROPOUT:
                        value = tl.where(keeps[i], value * scale, 0.0)
                    tl.store(y + first * DIM + place * DIM, value, mask=mask)
        else:
            at = scratch + (first - begin) * BLOCK
            for i in tl.static_range(STEP):
                tl.store(at + i * BLOCK, _in_order(outs, i, REVERSE, STEP))
        xs = next_xs
        if LEAVES:
            olds = next_olds
        if direction == 1:
            before = next_before
    if STREAM:
        # Rows with nothing new keep what they had.
        if (tl.maximum(limit - 1, 0) >= begin) & (tl.maximum(limit - 1, 0) < begin + tiles * TILE):
            states = tl.arange(0, N)
            at = hidden_end + (b.to(tl.int64) * DIM + columns)[None, :] * n_state + states[:, None]
            tl.store(at, end, mask=inside[None, :] & (states < n_state)[:, None])


@triton.jit(do_not_specialize_on_alignment=ONE_CHANNEL_EACH)
def forward(
    x, y, pre, scratch, sums, table, reach, omega, lengths, seed, hidden, hidden_end,
    batch, length, chunks, taps, dropout, scale, n_state,
    LENGTHS: tl.constexpr, MANY: tl.constexpr, WINDOW: tl.constexpr, LEAVES: tl.constexpr, STREAM: tl.constexpr,
    CARRIED: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr,
    DIRECTIONS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The average, ``omega x``, activation and dropout of all chunks that fall to this program."""
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    lanes = tl.arange(0, BLOCK)
    columns = tl.program_id(0) * BLOCK + lanes
    inside = columns < DIM
    direct = tl.load(omega + columns, mask=inside, other=0.0).to(tl.float32)
    noise = tl.load(seed) if DROPOUT else 0
    slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    mine = scratch + slot.to(tl.int64) * (CHUNK * BLOCK) + lanes
    first = tl.program_id(0) * (N * BLOCK)
    items = batch * chunks
    if WINDOW:  # channels of which something leaves the window, and the others, are two launches
        items = tl.where(_leaves(reach, taps, DIM, columns, inside, DIRECTIONS) == LEAVES, items, 0)
    for item in tl.range(tl.program_id(1), items, tl.num_programs(1), disable_licm=True):
        b = item // chunks
        j = item - b * chunks
        begin = j * CHUNK
        tiles = (tl.minimum(length - begin, CHUNK) + TILE - 1) // TILE
        row = b.to(tl.int64) * length * DIM + columns
        limit = length
        if LENGTHS:
            limit = tl.minimum(tl.load(lengths + b).to(tl.int32), length)
        for direction in tl.static_range(DIRECTIONS):
            needed = _reach(reach, direction, DIM, columns, inside)
            s, _ = _start(
                sums + first, table + first, x + row, b, j, limit, chunks, inside, direction, needed, taps,
                LEAVES, MANY, WINDOW, direction == 1, 1, DIRECTIONS, DIM, BLOCKS, CHUNK, N, BLOCK,
            )  # fmt: skip
            if CARRIED and not MANY:
                states = tl.arange(0, N)
                at = hidden + (b.to(tl.int64) * DIM + columns)[None, :] * n_state + states[:, None]
                s = tl.load(at, mask=inside[None, :] & (states < n_state)[:, None], other=0.0)
            _forward_sweep(
                s, x + row, y + row, pre + row, mine, hidden_end, table + first, direct, noise,
                b, begin, tiles, limit, length, columns, inside, direction, taps, dropout, scale, n_state,
                LEAVES, direction == DIRECTIONS - 1, LENGTHS, STREAM, SILU, DROPOUT, SAVE, DIRECTIONS, DIM, BLOCKS, N,
                BLOCK, TILE, STEP,
            )  # fmt: skip


@triton.jit
def _backward_sweep(
    s, h, x, grad, dx, scratch, table, omega, by_omega,
    begin, tiles, limit, length, inside, direction: tl.constexpr, taps,
    LEAVES: tl.constexpr, LENGTHS: tl.constexpr, DIRECTIONS: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One direction of one chunk; returns the gradients by weight, by q (without weight) and by omega."""
    REVERSE: tl.constexpr = direction == 0
    PARTS: tl.constexpr = TILE // STEP
    q = _coefficient(table, Q, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    weight = _coefficient(table, WEIGHT, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    by_weight = tl.zeros((N, BLOCK), tl.float32)
    by_q = tl.zeros((N, BLOCK), tl.float32)
    if LEAVES:
        gone = _coefficient(table, LEAVING, direction, BLOCKS, DIRECTIONS, N, BLOCK)
        slope = _coefficient(table, LEAVING_SLOPE, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    steps = tiles * PARTS
    # Only the direct path looks at padding.
    seen = length if direction == 0 else limit
    back = taps if REVERSE else -taps
    local = _place(0, steps, REVERSE, STEP)
    xs = _tokens(x, begin + local, seen, inside, DIM, REVERSE, STEP)
    gs = _tokens(grad, begin + local, length, inside, DIM, REVERSE, STEP)
    if LEAVES:
        olds = _tokens(grad, begin + local + back, length, inside, DIM, REVERSE, STEP)
    if direction == 1:
        before = _tokens(scratch, local, steps * STEP, inside, BLOCK, REVERSE, STEP)
    for k in tl.range(0, steps, disable_licm=True):
        first = begin + local
        local = _place(k + 1, steps, REVERSE, STEP)
        next_xs = _tokens(x, begin + local, seen, inside, DIM, REVERSE, STEP)
        next_gs = _tokens(grad, begin + local, length, inside, DIM, REVERSE, STEP)
        if LEAVES:
            next_olds = _tokens(grad, begin + local + back, length, inside, DIM, REVERSE, STEP)
        if direction == 1:
            next_before = _tokens(scratch, local, steps * STEP, inside, BLOCK, REVERSE, STEP)
        if k % PARTS == 0:
            correction = _coefficient(table, CORRECTION, direction, BLOCKS, DIRECTIONS, N, BLOCK)
            s = s + s * correction
            h = h + h * correction
        for i in tl.static_range(STEP):
            place = STEP - 1 - i if REVERSE else i
            t = first + place
            h = h * q + s
            s = s * q + gs[i][None, :]
            if LEAVES:
                h = h - slope * olds[i][None, :]
                s = s - gone * olds[i][None, :]
            u = xs[i]
            if LENGTHS and direction == 0:
                u = tl.where(t < limit, u, 0.0)
            by_weight = by_weight + u[None, :] * s
            by_q = by_q + u[None, :] * h
            value = tl.sum(s * weight, axis=0)
            if direction == 0:
                # No gradient stays none, also where padding holds nan.
                by_omega = by_omega + tl.where(gs[i] == 0.0, 0.0, gs[i] * xs[i])
            if direction == 1:
                value = value + before[i]
            if direction == DIRECTIONS - 1:
                if LENGTHS:
                    value = tl.where(t < limit, value, 0.0)
                value = value + omega * gs[i]
                tl.store(dx + first * DIM + place * DIM, value, mask=inside & (t < length))
            else:
                tl.store(scratch + (first - begin) * BLOCK + place * BLOCK, value)
        xs = next_xs
        gs = next_gs
        if LEAVES:
            olds = next_olds
        if direction == 1:
            before = next_before
    return by_weight, by_q, by_omega


@triton.jit(do_not_specialize_on_alignment=ONE_CHANNEL_EACH)
def backward(
    x, grad, dx, scratch, sums, table, reach, omega, lengths, partial,
    batch, length, chunks, taps,
    LENGTHS: tl.constexpr, MANY: tl.constexpr, WINDOW: tl.constexpr, LEAVES: tl.constexpr,
    DIRECTIONS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradients of all chunks that fall to this program, from ``grad``, that by the output before activation.

    ``partial (programs, blocks, directions * 2 * N + 1, BLOCK)`` receives its share of the gradients by weight, q and
    omega.
    """
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    lanes = tl.arange(0, BLOCK)
    columns = tl.program_id(0) * BLOCK + lanes
    inside = columns < DIM
    direct = tl.load(omega + columns, mask=inside, other=0.0).to(tl.float32)
    slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    mine = scratch + slot.to(tl.int64) * (CHUNK * BLOCK) + lanes
    first = tl.program_id(0) * (N * BLOCK)
    share = partial + slot.to(tl.int64) * ((DIRECTIONS * 2 * N + 1) * BLOCK)
    by_omega = tl.zeros((BLOCK,), tl.float32)
    items = batch * chunks
    if WINDOW:  # channels of which something leaves the window, and the others, are two launches
        items = tl.where(_leaves(reach, taps, DIM, columns, inside, DIRECTIONS) == LEAVES, items, 0)
    for item in tl.range(tl.program_id(1), items, tl.num_programs(1), disable_licm=True):
        b = item // chunks
        j = item - b * chunks
        begin = j * CHUNK
        tiles = (tl.minimum(length - begin, CHUNK) + TILE - 1) // TILE
        row = b.to(tl.int64) * length * DIM + columns
        limit = length
        if LENGTHS:
            limit = tl.minimum(tl.load(lengths + b).to(tl.int32), length)
        for direction in tl.static_range(DIRECTIONS):
            needed = _reach(reach, direction, DIM, columns, inside)
            s, h = _start(
                sums + first, table + first, grad + row, b, j, length, chunks, inside, direction, needed, taps,
                LEAVES, MANY, WINDOW, direction == 0, 2, DIRECTIONS, DIM, BLOCKS, CHUNK, N, BLOCK,
            )  # fmt: skip
            by_weight, by_q, by_omega = _backward_sweep(
                s, h, x + row, grad + row, dx + row, mine, table + first, direct, by_omega,
                begin, tiles, limit, length, inside, direction, taps,
                LEAVES, LENGTHS, DIRECTIONS, DIM, BLOCKS, N, BLOCK, TILE, STEP,
            )  # fmt: skip
            # Kept in memory from chunk to chunk: registers are short. The first chunk finds nothing there yet.
            later = item >= tl.num_programs(1)
            at = share + direction * (2 * N * BLOCK) + _states(N, BLOCK)
            tl.store(at, by_weight + tl.load(at, mask=inside[None, :] & later, other=0.0))
            at = at + N * BLOCK
            tl.store(at, by_q + tl.load(at, mask=inside[None, :] & later, other=0.0))
            tl.debug_barrier()
    tl.store(share + DIRECTIONS * 2 * N * BLOCK + lanes, by_omega, mask=items > 0)


@triton.jit
def finish(
    partial, delta, alpha, beta, gamma, by_delta, by_alpha, by_beta, by_gamma, by_omega,
    programs, dim, n_state, read_scale,
    DIRECTIONS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds up the shares of all programs, always in the same order, and goes on to the parameters."""
    which = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    blocks = tl.num_programs(1)
    slots = DIRECTIONS * 2 * N + 1
    direction = which // n_state
    n = which - direction * n_state
    is_omega = which == DIRECTIONS * n_state
    slot = tl.where(is_omega, slots - 1, direction * 2 * N + n)
    weight = tl.zeros((ROWS, BLOCK), tl.float64)
    decay = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = (rows.to(tl.int64) * blocks + tl.program_id(1)) * slots + slot
        at = partial + at[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = (rows < programs)[:, None]
        weight += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        decay += tl.load(at + N * BLOCK, mask=mask & (not is_omega), other=0.0).to(tl.float64)
    by_weight = tl.sum(weight, axis=0)
    if is_omega:
        tl.store(by_omega + columns, by_weight.to(tl.float32).to(by_omega.dtype.element_ty), mask=inside)
    else:
        at = (direction * dim + columns) * n_state + n
        d = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        a = tl.load(alpha + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        bt = tl.load(beta + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        g = tl.load(gamma + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64) * read_scale
        p = _sigmoid64(d)
        damping = _sigmoid64(a)
        by_q = tl.sum(decay, axis=0) * (g * p * bt)
        delta_grad = p * _sigmoid64(-d) * (by_weight * g * bt - by_q * damping)
        alpha_grad = -by_q * p * damping * _sigmoid64(-a)
        tl.store(by_delta + at, delta_grad.to(tl.float32).to(by_delta.dtype.element_ty), mask=inside)
        tl.store(by_alpha + at, alpha_grad.to(tl.float32).to(by_alpha.dtype.element_ty), mask=inside)
        tl.store(by_beta + at, (by_weight * g * p).to(tl.float32).to(by_beta.dtype.element_ty), mask=inside)
        tl.store(
            by_gamma + at, (by_weight * p * bt * read_scale).to(tl.float32).to(by_gamma.dtype.element_ty), mask=inside
        )
