"""What the kernels of the moving average share: coefficients, tokens, start states."""

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

ONE_CHANNEL_EACH = ("table", "sums", "hidden", "hidden_end", "fresh", "fresh_end", "partial")
"""What is read or written as ``(N, BLOCK)``. If the compiler knew these addresses to be multiples of 16 bytes it would
give four neighbouring channels to one thread, to move them together, and spread the states over several threads, which
would then have to talk to each other in the innermost loop."""


@triton.jit
def sigmoid64(x):
    return 1.0 / (1.0 + tl.exp(-tl.minimum(tl.maximum(x, -700.0), 700.0)))


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_slope(x):
    s = tl.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def places_of_states(N: tl.constexpr, BLOCK: tl.constexpr):
    """Places ``(N, BLOCK)`` of a block's states."""
    return tl.arange(0, N)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def coefficient(
    table, field, direction, BLOCKS: tl.constexpr, DIRECTIONS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    """``(N, BLOCK)`` of the table, which begins with this program's block."""
    return tl.load(table + (field * DIRECTIONS + direction) * (BLOCKS * N * BLOCK) + places_of_states(N, BLOCK))


@triton.jit
def longest_reach(reach, direction, dim, columns, inside):
    return tl.max(tl.load(reach + direction * dim + columns, mask=inside, other=0), axis=0)


@triton.jit
def anything_leaves(reach, taps, dim, columns, inside, DIRECTIONS: tl.constexpr):
    """Whether a token that leaves the window still contributes, in any direction."""
    longest = longest_reach(reach, 0, dim, columns, inside)
    if DIRECTIONS == 2:
        longest = tl.maximum(longest, longest_reach(reach, 1, dim, columns, inside))
    return longest > taps


@triton.jit
def load_token(row, t, limit, inside, DIM: tl.constexpr):
    """``(BLOCK,)`` float32: token t, zero outside 0..limit - 1. ``row (BLOCK,)`` points to token 0."""
    return tl.load(row + t * DIM, mask=inside & (t >= 0) & (t < limit), other=0.0).to(tl.float32)


@triton.jit
def load_tokens(row, first, limit, inside, DIM: tl.constexpr, REVERSE: tl.constexpr, STEP: tl.constexpr):
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
def in_order(tokens, i: tl.constexpr, REVERSE: tl.constexpr, STEP: tl.constexpr):
    """Of a tuple in the order of the scan, the one that comes i-th in the sequence."""
    return tokens[STEP - 1 - i if REVERSE else i]


@triton.jit
def keep_four(seed, b, place, dropout):
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
def sum_at(
    sums, b, j, chunks, direction,
    BLOCKS: tl.constexpr, DIRECTIONS: tl.constexpr, PAIR: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pointers ``(N, BLOCK)`` into ``sums (B, chunks, directions, PAIR, blocks, N, BLOCK)``, from its block on."""
    place = ((b.to(tl.int64) * chunks + j) * DIRECTIONS + direction) * PAIR
    return sums + place * (BLOCKS * N * BLOCK) + places_of_states(N, BLOCK)


@triton.jit
def place_of(k, steps, REVERSE: tl.constexpr, STEP: tl.constexpr):
    """First token, in the chunk, of the k-th of its steps in the order of the scan; outside behind the last."""
    return (steps - 1 - k if REVERSE else k) * STEP


@triton.jit
def start_states(
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
        at = sum_at(sums, b, j, chunks, direction, BLOCKS, DIRECTIONS, PAIR, N, BLOCK)
        s = tl.load(at)
        if PAIR == 2:
            h = tl.load(at + SECOND)
    if MANY and WINDOW:
        loss = coefficient(table, CHUNK_LOSS, direction, BLOCKS, DIRECTIONS, N, BLOCK)
        whole = (taps + CHUNK - 1) // CHUNK
        back = tl.minimum(whole, (needed + CHUNK - 1) // CHUNK)
        back = tl.minimum(back, chunks - 1 - j if REVERSE else j)
        for i in range(back):
            other = j + back - i if REVERSE else j - back + i
            at = sum_at(sums, b, other, chunks, direction, BLOCKS, DIRECTIONS, PAIR, N, BLOCK)
            if PAIR == 2:
                slope = coefficient(table, CHUNK_SLOPE, direction, BLOCKS, DIRECTIONS, N, BLOCK)
                h = h - loss * h + slope * s + tl.load(at + SECOND)
            s = s - loss * s + tl.load(at)
        if LEAVES:
            q = coefficient(table, Q, direction, BLOCKS, DIRECTIONS, N, BLOCK)
            old = tl.zeros((N, BLOCK), tl.float32)
            older = tl.zeros((N, BLOCK), tl.float32)
            for i in range(whole * CHUNK - taps):
                t = (j + 1 + whole) * CHUNK - 1 - i if REVERSE else (j - whole) * CHUNK + i
                if PAIR == 2:
                    older = older * q + old
                old = old * q + load_token(row, t, limit, inside, DIM)[None, :]
            gone = coefficient(table, LEAVING, direction, BLOCKS, DIRECTIONS, N, BLOCK)
            if PAIR == 2:
                slope = coefficient(table, LEAVING_SLOPE, direction, BLOCKS, DIRECTIONS, N, BLOCK)
                h = h - gone * older - slope * old
            s = s - gone * old
    return s, h
