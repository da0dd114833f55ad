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
    _bias,
    _dot,
    _dot_add,
    _interval,
    _kept,
    _moment,
    _place,
    _put,
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
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A block of queries and a tile of BH + BR value features (two powers of two, or one and 0): the output, gated if
    there is a gate, and the ``statistics (2, H, Q)`` of the softmax. ``attended``, if given, receives what is
    gated.
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
    if BIAS == ORIGINAL:
        t_i = _moment(q_position, q_first + tl.minimum(m, q_len - 1))
    if DROPOUT:
        seed_value = tl.load(seed)

    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BH), tl.float32)
    if BR > 0:
        rest = tl.zeros((BM, BR), tl.float32)
    for n0 in range(block_low, block_high + 1, BN):
        j = n0 + tl.arange(0, BN)
        seen = j <= block_high
        keys = _tile(k, k_first + j, seen, KR, 0, Z, ZP)
        products = _dot(queries, tl.trans(keys), PRECISION)
        visible = (j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None])
        scores = products * factor
        if BIAS != 0:
            t_j = j
            if BIAS == ORIGINAL:
                t_j = _moment(k_position, k_first + tl.minimum(j, block_high))
            bias, _ = _bias(table, distance, n0 - i0, t_i[:, None], t_j[None, :], entries, window, BIAS)
            scores += bias * LOG2E if ACTIVATION == SOFTMAX else bias
        scores = tl.where(visible, scores, float("-inf"))
        if ACTIVATION == SOFTMAX:
            higher = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - shift[:, None])
            rescale = tl.exp2(largest - shift)
            total = total * rescale + tl.sum(weights, 1)
            sums *= rescale[:, None]
            if BR > 0:
                rest *= rescale[:, None]
            largest = higher
        else:
            weights = _weights(scores, 0.0, 0.0, ACTIVATION)
        if DROPOUT:
            kept = _kept(seed_value, rows[:, None], head, j[None, :], dropout)
            weights = tl.where(kept, weights, 0.0)
        values = _tile(v, k_first + j, seen, VR, tile * (BH + BR), WIDTH, BH)
        sums = _dot_add(weights.to(values.dtype), values, sums, PRECISION)
        if BR > 0:
            values = _tile(v, k_first + j, seen, VR, tile * (BH + BR) + BH, WIDTH, BR)
            rest = _dot_add(weights.to(values.dtype), values, rest, PRECISION)

    if ACTIVATION == SOFTMAX:
        share = tl.where(total == 0.0, 0.0, tl.div_rn(1.0, total))
        if tile == 0:
            at = statistics + head.to(tl.int64) * n_queries + rows
            tl.store(at, tl.where(total == 0.0, 0.0, largest), mask=own)
            tl.store(at + n_queries.to(tl.int64) * HEADS, share, mask=own)
    else:
        share = tl.full((BM,), 1.0, tl.float32)
    if DROPOUT:
        share = share / (1.0 - dropout)
    _emit(
        out, attended, gate, sums * share[:, None], rows, own, head, tile * (BH + BR),
        GR=GR, GH=GH, HEADS=HEADS, WIDTH=WIDTH, BLOCK=BH,
    )  # fmt: skip
    if BR > 0:
        _emit(
            out, attended, gate, rest * share[:, None], rows, own, head, tile * (BH + BR) + BH,
            GR=GR, GH=GH, HEADS=HEADS, WIDTH=WIDTH, BLOCK=BR,
        )  # fmt: skip


@triton.jit
def _emit(
    out, attended, gate, sums, rows, own, head, first,
    GR: tl.constexpr, GH: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write some features of the output, and of what is gated if that is wanted."""
    if attended is not None:
        _put(attended + head * WIDTH, sums, rows, own, HEADS * WIDTH, first, WIDTH, BLOCK)
    if gate is not None:
        sums = sums * _tile(gate + head * GH, rows, own, GR, first, WIDTH, BLOCK).to(tl.float32)
    _put(out + head * WIDTH, sums, rows, own, HEADS * WIDTH, first, WIDTH, BLOCK)
