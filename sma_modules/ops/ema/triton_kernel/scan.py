"""The forward scan."""

from __future__ import annotations

import triton
import triton.language as tl

from sma_modules.ops.ema.triton_kernel.shared import (
    CORRECTION,
    DRIVE,
    LEAVING,
    ONE_CHANNEL_EACH,
    WEIGHT,
    Q,
    anything_leaves,
    coefficient,
    in_order,
    keep_four,
    load_tokens,
    longest_reach,
    place_of,
    silu,
    start_states,
)


@triton.jit
def _forward_sweep(
    s, x, y, pre, scratch, hidden_end, table, omega, seed,
    b, begin, tiles, limit, length, skipped, columns, inside, direction: tl.constexpr, taps, dropout, scale, n_state,
    SKIPS: tl.constexpr, LEAVES: tl.constexpr, LAST: tl.constexpr, LENGTHS: tl.constexpr, STREAM: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr, DIRECTIONS: tl.constexpr, DIM: tl.constexpr,
    BLOCKS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One direction of one chunk. The last one adds what the first left in ``scratch`` and finishes the output."""
    REVERSE: tl.constexpr = direction == 1
    PARTS: tl.constexpr = TILE // STEP
    q = coefficient(table, Q, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    weight = coefficient(table, WEIGHT, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    if LEAVES:
        gone = coefficient(table, LEAVING, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    if STREAM:
        drive = coefficient(table, DRIVE, direction, BLOCKS, DIRECTIONS, N, BLOCK)
        end = s
    steps = tiles * PARTS
    # Only the direct path reads padding.
    seen = length if LAST else limit
    back = taps if REVERSE else -taps
    local = place_of(0, steps, REVERSE, STEP)
    xs = load_tokens(x, begin + local, seen, inside, DIM, REVERSE, STEP)
    if LEAVES:
        olds = load_tokens(x, begin + local + back, limit, inside, DIM, REVERSE, STEP)
    if direction == 1:
        before = load_tokens(scratch, local, steps * STEP, inside, BLOCK, REVERSE, STEP)
    for k in tl.range(0, steps, disable_licm=True):
        first = begin + local
        local = place_of(k + 1, steps, REVERSE, STEP)
        next_xs = load_tokens(x, begin + local, seen, inside, DIM, REVERSE, STEP)
        if LEAVES:
            next_olds = load_tokens(x, begin + local + back, limit, inside, DIM, REVERSE, STEP)
        if direction == 1:
            next_before = load_tokens(scratch, local, steps * STEP, inside, BLOCK, REVERSE, STEP)
        if k % PARTS == 0:
            s = s + s * coefficient(table, CORRECTION, direction, BLOCKS, DIRECTIONS, N, BLOCK)
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
                    keeps = keep_four(seed, b, (first // 4 + group) * DIM + columns, dropout)
                for i in tl.static_range(4):
                    place = group * 4 + i
                    value = in_order(outs, group * 4 + i, REVERSE, STEP) + omega * in_order(
                        xs, group * 4 + i, REVERSE, STEP
                    )
                    if direction == 1:
                        value = value + in_order(before, group * 4 + i, REVERSE, STEP)
                    mask = inside & (first + place < length)
                    if SKIPS:
                        mask = mask & (first + place >= skipped)
                    if SAVE:
                        tl.store(pre + first * DIM + place * DIM, value, mask=mask)
                    if SILU:
                        value = silu(value)
                    if DROPOUT:
                        value = tl.where(keeps[i], value * scale, 0.0)
                    tl.store(y + first * DIM + place * DIM, value, mask=mask)
        else:
            at = scratch + (first - begin) * BLOCK
            for i in tl.static_range(STEP):
                tl.store(at + i * BLOCK, in_order(outs, i, REVERSE, STEP))
        xs = next_xs
        if LEAVES:
            olds = next_olds
        if direction == 1:
            before = next_before
    if STREAM:
        # Rows without new tokens keep their state.
        if (tl.maximum(limit - 1, 0) >= begin) & (tl.maximum(limit - 1, 0) < begin + tiles * TILE):
            states = tl.arange(0, N)
            at = hidden_end + (b.to(tl.int64) * DIM + columns)[None, :] * n_state + states[:, None]
            tl.store(at, end, mask=inside[None, :] & (states < n_state)[:, None])


@triton.jit(do_not_specialize_on_alignment=ONE_CHANNEL_EACH)
def forward(
    x, y, pre, scratch, sums, table, reach, omega, lengths, seed, hidden, hidden_end,
    batch, length, skipped, chunks, taps, dropout, scale, n_state,
    SKIPS: tl.constexpr, LENGTHS: tl.constexpr, MANY: tl.constexpr, WINDOW: tl.constexpr, LEAVES: tl.constexpr,
    STREAM: tl.constexpr, CARRIED: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr,
    DIRECTIONS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The average, ``omega x``, activation and dropout of all chunks that fall to this program.

    ``SKIPS``: there is no output for the first ``skipped`` tokens, and the lengths do not count them.
    """
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    lanes = tl.arange(0, BLOCK)
    columns = tl.program_id(0) * BLOCK + lanes
    inside = columns < DIM
    direct = tl.load(omega + columns, mask=inside, other=0.0).to(tl.float32)
    noise = tl.load(seed) if DROPOUT else 0
    slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    mine = scratch + slot.to(tl.int64) * (CHUNK * BLOCK) + lanes
    first = tl.program_id(0) * (N * BLOCK)
    ahead = skipped // CHUNK if SKIPS else 0
    items = batch * (chunks - ahead)
    if WINDOW:  # channels of which something leaves the window, and the others, are two launches
        items = tl.where(anything_leaves(reach, taps, DIM, columns, inside, DIRECTIONS) == LEAVES, items, 0)
    for item in tl.range(tl.program_id(1), items, tl.num_programs(1), disable_licm=True):
        b = item // (chunks - ahead)
        j = item - b * (chunks - ahead) + ahead
        begin = j * CHUNK
        tiles = (tl.minimum(length - begin, CHUNK) + TILE - 1) // TILE
        row = b.to(tl.int64) * length * DIM + columns
        out = y + row
        if SKIPS:
            out -= (b.to(tl.int64) + 1) * skipped * DIM
        limit = length
        if LENGTHS:
            limit = tl.minimum(tl.load(lengths + b).to(tl.int32) + skipped, length)
        for direction in tl.static_range(DIRECTIONS):
            needed = longest_reach(reach, direction, DIM, columns, inside)
            s, _ = start_states(
                sums + first, table + first, x + row, b, j, limit, chunks, inside, direction, needed, taps,
                LEAVES, MANY, WINDOW, direction == 1, 1, DIRECTIONS, DIM, BLOCKS, CHUNK, N, BLOCK,
            )  # fmt: skip
            if CARRIED and not MANY:
                states = tl.arange(0, N)
                at = hidden + (b.to(tl.int64) * DIM + columns)[None, :] * n_state + states[:, None]
                s = tl.load(at, mask=inside[None, :] & (states < n_state)[:, None], other=0.0)
            _forward_sweep(
                s, x + row, out, pre + row, mine, hidden_end, table + first, direct, noise,
                b, begin, tiles, limit, length, skipped, columns, inside, direction, taps, dropout, scale, n_state,
                SKIPS, LEAVES, direction == DIRECTIONS - 1, LENGTHS, STREAM, SILU, DROPOUT, SAVE, DIRECTIONS, DIM,
                BLOCKS, N, BLOCK, TILE, STEP,
            )  # fmt: skip
