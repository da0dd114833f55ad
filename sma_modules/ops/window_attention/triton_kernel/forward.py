# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The forward kernel, in the manner of flash attention."""

import triton
import triton.language as tl

from sma_modules.ops.window_attention.triton_kernel.scores import (
    FAR,
    LOG2E,
    ORIGINAL,
    SOFTMAX,
    UNSPECIALISED,
    _dot,
    _dot_add,
    _entry,
    _interval,
    _kept,
    _place,
    _put,
    _scores,
    _since,
    _tile,
    _weights,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def attend_kernel(
    q, k, v, gate, table, q_cu, k_cu, k_start, q_position, k_position, seed, out, statistics, attended,
    n_queries, n_keys, batch, window, chunk, entries, scale, dropout,
    QR: tl.constexpr, QH: tl.constexpr, KR: tl.constexpr, KH: tl.constexpr, VR: tl.constexpr, VH: tl.constexpr,
    GR: tl.constexpr, GH: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, COUNTED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """A block of queries and a tile of the value features: the output, gated if there is a gate, and the
    ``statistics (2, H, Q)`` of the softmax. ``attended``, if given, receives what is gated.
    """
    program = tl.program_id(0)
    if CAUSAL:  # the longest first
        program = tl.num_programs(0) - 1 - program
    head = tl.program_id(1) // TILES
    tile = tl.program_id(1) % TILES
    q_first, q_len, k_first, k_len, start, m0 = _place(q_cu, k_cu, k_start, batch, n_queries, n_keys, program, BM)
    if (m0 < 0) | (m0 >= q_len):
        return
    m = m0 + tl.arange(0, BM)
    own = m < q_len
    rows = q_first + m
    i0 = m0 + (k_len - q_len)
    i = m + (k_len - q_len)
    distance = tl.arange(0, BN)[None, :] - tl.arange(0, BM)[:, None]
    low, high = _interval(i, own, k_len, start, window, chunk, CAUSAL, WINDOW, CHUNK)
    sees = low <= high
    block_low = tl.min(tl.where(sees, low, FAR))
    block_high = tl.max(tl.where(sees, high, -1))

    factor = scale * LOG2E if ACTIVATION == SOFTMAX else scale
    if COUNTED:
        factor = (1.0 / tl.maximum(high - low + 1, 1).to(tl.float32))[:, None]
    queries = _tile(q + head * QH, rows, sees, QR, 0, Z, ZP)
    k += (head // GROUP) * KH
    v += (head // GROUP) * VH
    t_i = i
    reference = start * 0
    if BIAS == ORIGINAL:
        reference = tl.load(q_position + q_first + m0)
        t_i = _since(q_position, rows, own, reference)
    if DROPOUT:
        seed_value = tl.load(seed)

    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BH), tl.float32)
    for n0 in range(block_low, block_high + 1, BN):
        j = n0 + tl.arange(0, BN)
        seen = j <= block_high
        keys = _tile(k, k_first + j, seen, KR, 0, Z, ZP)
        products = _dot(queries, tl.trans(keys), PRECISION)
        visible = (j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None])
        t_j = j
        if BIAS == ORIGINAL:
            t_j = _since(k_position, k_first + j, seen, reference)
        index = _entry(distance, n0 - i0, t_i[:, None], t_j[None, :], entries, window, BIAS)
        scores = _scores(products, factor, index, visible, table, n0 <= block_high, BIAS, ACTIVATION)
        if ACTIVATION == SOFTMAX:
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - shift[:, None])
            rescale = tl.exp2(largest - shift)
            total = total * rescale + tl.sum(weights, 1)
            sums *= rescale[:, None]
            largest = higher
        else:
            weights = _weights(scores, visible, 0.0, 0.0, ACTIVATION)
        if DROPOUT:
            kept = _kept(seed_value, rows[:, None], head, j[None, :], dropout)
            weights = tl.where(kept, weights, 0.0)
        values = _tile(v, k_first + j, seen, VR, tile * BH, WIDTH, BH)
        sums = _dot_add(weights.to(values.dtype), values, sums, PRECISION)

    if ACTIVATION == SOFTMAX:
        share = tl.where(total == 0.0, 0.0, 1.0 / total)
        sums = sums * share[:, None]
        if tile == 0:
            at = statistics + head.to(tl.int64) * n_queries + rows
            tl.store(at, tl.where(total == 0.0, 0.0, largest), mask=own)
            tl.store(at + n_queries.to(tl.int64) * HEADS, share, mask=own)
    if DROPOUT:
        sums = sums / (1.0 - dropout)
    if attended is not None:
        _put(attended + head * WIDTH, sums, rows, own, HEADS * WIDTH, tile * BH, WIDTH, BH)
    if gate is not None:
        sums = sums * _tile(gate + head * GH, rows, own, GR, tile * BH, WIDTH, BH).to(tl.float32)
    _put(out + head * WIDTH, sums, rows, own, HEADS * WIDTH, tile * BH, WIDTH, BH)
