"""The backward scan, and what goes before and after it."""

from __future__ import annotations

import triton
import triton.language as tl

from sma_modules.ops.ema.triton_kernel.shared import (
    CORRECTION,
    LEAVING,
    LEAVING_SLOPE,
    ONE_CHANNEL_EACH,
    WEIGHT,
    Q,
    anything_leaves,
    coefficient,
    keep_four,
    load_tokens,
    longest_reach,
    place_of,
    places_of_states,
    sigmoid64,
    silu_slope,
    start_states,
)


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
        keeps = keep_four(tl.load(seed), b, place, dropout)
    for i in tl.static_range(4):
        mask = (place < total) & (t + i < length)
        g = tl.load(dy + at + i * dim, mask=mask, other=0.0).to(tl.float32)
        # No gradient stays none, also where padding holds nan.
        if SILU:
            before = tl.load(pre + at + i * dim, mask=mask, other=0.0).to(tl.float32)
            g = tl.where(g == 0.0, 0.0, g * silu_slope(before))
        if DROPOUT:
            g = tl.where(keeps[i], g * scale, 0.0)
        tl.store(out + at + i * dim, g, mask=mask)


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
    q = coefficient(table, Q, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    weight = coefficient(table, WEIGHT, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    by_weight = tl.zeros((N, BLOCK), tl.float32)
    by_q = tl.zeros((N, BLOCK), tl.float32)
    if LEAVES:
        gone = coefficient(table, LEAVING, direction, BLOCKS, DIRECTIONS, N, BLOCK)
        slope = coefficient(table, LEAVING_SLOPE, direction, BLOCKS, DIRECTIONS, N, BLOCK)
    steps = tiles * PARTS
    # Only the direct path reads padding.
    seen = length if direction == 0 else limit
    back = taps if REVERSE else -taps
    local = place_of(0, steps, REVERSE, STEP)
    xs = load_tokens(x, begin + local, seen, inside, DIM, REVERSE, STEP)
    gs = load_tokens(grad, begin + local, length, inside, DIM, REVERSE, STEP)
    if LEAVES:
        olds = load_tokens(grad, begin + local + back, length, inside, DIM, REVERSE, STEP)
    if direction == 1:
        before = load_tokens(scratch, local, steps * STEP, inside, BLOCK, REVERSE, STEP)
    for k in tl.range(0, steps, disable_licm=True):
        first = begin + local
        local = place_of(k + 1, steps, REVERSE, STEP)
        next_xs = load_tokens(x, begin + local, seen, inside, DIM, REVERSE, STEP)
        next_gs = load_tokens(grad, begin + local, length, inside, DIM, REVERSE, STEP)
        if LEAVES:
            next_olds = load_tokens(grad, begin + local + back, length, inside, DIM, REVERSE, STEP)
        if direction == 1:
            next_before = load_tokens(scratch, local, steps * STEP, inside, BLOCK, REVERSE, STEP)
        if k % PARTS == 0:
            correction = coefficient(table, CORRECTION, direction, BLOCKS, DIRECTIONS, N, BLOCK)
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
        items = tl.where(anything_leaves(reach, taps, DIM, columns, inside, DIRECTIONS) == LEAVES, items, 0)
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
            needed = longest_reach(reach, direction, DIM, columns, inside)
            s, h = start_states(
                sums + first, table + first, grad + row, b, j, length, chunks, inside, direction, needed, taps,
                LEAVES, MANY, WINDOW, direction == 0, 2, DIRECTIONS, DIM, BLOCKS, CHUNK, N, BLOCK,
            )  # fmt: skip
            by_weight, by_q, by_omega = _backward_sweep(
                s, h, x + row, grad + row, dx + row, mine, table + first, direct, by_omega,
                begin, tiles, limit, length, inside, direction, taps,
                LEAVES, LENGTHS, DIRECTIONS, DIM, BLOCKS, N, BLOCK, TILE, STEP,
            )  # fmt: skip
            # Kept in memory from chunk to chunk: registers are short. The first chunk starts from nothing.
            later = item >= tl.num_programs(1)
            at = share + direction * (2 * N * BLOCK) + places_of_states(N, BLOCK)
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
        p = sigmoid64(d)
        damping = sigmoid64(a)
        by_q = tl.sum(decay, axis=0) * (g * p * bt)
        delta_grad = p * sigmoid64(-d) * (by_weight * g * bt - by_q * damping)
        alpha_grad = -by_q * p * damping * sigmoid64(-a)
        tl.store(by_delta + at, delta_grad.to(tl.float32).to(by_delta.dtype.element_ty), mask=inside)
        tl.store(by_alpha + at, alpha_grad.to(tl.float32).to(by_alpha.dtype.element_ty), mask=inside)
        tl.store(by_beta + at, (by_weight * g * p).to(tl.float32).to(by_beta.dtype.element_ty), mask=inside)
        tl.store(
            by_gamma + at, (by_weight * p * bt * read_scale).to(tl.float32).to(by_gamma.dtype.element_ty), mask=inside
        )
