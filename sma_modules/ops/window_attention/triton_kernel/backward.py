# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The kernels of the gradient; that of a table of biases is finished in ``tables.py``."""

import triton
import triton.language as tl

from sma_modules.ops.window_attention.triton_kernel.scores import (
    FAR,
    LOCAL,
    LOG2E,
    ORIGINAL,
    SOFTMAX,
    UNSPECIALISED,
    _bias,
    _chunk_of,
    _dot,
    _dot_add,
    _dot_slopes,
    _interval,
    _kept,
    _moment,
    _place,
    _put,
    _share,
    _slopes,
    _statistics,
    _tile,
    _weights,
)
from sma_modules.ops.window_attention.triton_kernel.tables import _count, _diagonals, _exponent


@triton.jit(do_not_specialize=["n_queries"])
def ungate_kernel(
    dout, attended, gate, d_gate, d_attended, delta, n_queries,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Of every query and head, the gradients of the gate and of what is gated; and, if ``delta (H, Q)`` is given, the
    sum over features of gradient times output.
    """
    at = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    own = at < n_queries.to(tl.int64) * HEADS
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, WIDTH, BH):
        grads = _tile(dout, at, own, WIDTH, first, WIDTH, BH).to(tl.float32)
        values = _tile(attended, at, own, WIDTH, first, WIDTH, BH).to(tl.float32)
        if gate is not None:
            _put(d_gate, grads * values, at, own, WIDTH, first, WIDTH, BH)
            grads = grads * _tile(gate, at, own, WIDTH, first, WIDTH, BH).to(tl.float32)
            _put(d_attended, grads, at, own, WIDTH, first, WIDTH, BH)
        total += tl.sum(grads * values, 1)
    if delta is not None:
        tl.store(delta + (at % HEADS) * n_queries + at // HEADS, total, mask=own)


@triton.jit
def _deltas(delta, rows, keep, head, n_queries, HEADS: tl.constexpr, DELTAS: tl.constexpr):
    total = tl.load(delta + head.to(tl.int64) * n_queries + rows, mask=keep, other=0.0)
    for part in tl.static_range(1, DELTAS):
        total += tl.load(delta + (part * HEADS + head).to(tl.int64) * n_queries + rows, mask=keep, other=0.0)
    return total


@triton.jit(do_not_specialize=UNSPECIALISED)
def d_keys_kernel(
    q, k, v, table, q_cu, k_cu, k_start, q_position, k_position, seed, statistics, delta, d_attended, dk, dv, peak,
    n_queries, n_keys, batch, window, chunk, entries, scale, dropout,
    QR: tl.constexpr, QH: tl.constexpr, KR: tl.constexpr, KH: tl.constexpr, VR: tl.constexpr, VH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, DELTAS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, COUNTED: tl.constexpr,
    PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A block of keys: the gradient of the keys (DK), of a tile of the value features (DV), or both if one tile is all.

    SPLIT: of its share of the queries, and ``dk`` and ``dv`` have a first dimension for the shares. ``peak`` gets the
    bits of the largest absolute gradient of any score if biases go by original position.
    """
    LOOPED: tl.constexpr = TILES > 1 and DK
    kv_head = tl.program_id(1) if LOOPED else tl.program_id(1) // TILES
    tile = 0 if LOOPED else tl.program_id(1) % TILES
    program = tl.program_id(0)
    k_first, k_len, q_first, q_len, start, n0 = _place(k_cu, q_cu, k_start, batch, n_keys, n_queries, program, BN)
    if (n0 < 0) | (n0 >= k_len):
        return
    j = n0 + tl.arange(0, BN)
    own = j < k_len
    rows = k_first + j
    distance = tl.arange(0, BN)[None, :] - tl.arange(0, BM)[:, None]
    last = tl.minimum(n0 + BN, k_len) - 1
    shift = k_len - q_len
    first_query = shift  # as the index of the key it is aligned with
    end_query = k_len
    if CAUSAL:
        first_query = tl.maximum(first_query, n0)
    elif WINDOW:
        first_query = tl.maximum(first_query, n0 - window)
    if WINDOW:
        end_query = tl.minimum(end_query, last + window + 1)
    if CHUNK:
        first_query = tl.maximum(first_query, _chunk_of(n0, start, chunk))
        end_query = tl.minimum(end_query, _chunk_of(last, start, chunk) + chunk)
    if SPLIT:
        first_query, end_query = _share(first_query, end_query, BM)

    until = tl.zeros_like(j) + k_len  # the query behind the last one that sees a key
    if WINDOW:
        until = tl.minimum(until, j + window + 1)
    if CHUNK:
        until = tl.minimum(until, _chunk_of(j, start, chunk) + chunk)
    seen = own & (until > shift)
    keys = _tile(k + kv_head * KH, rows, seen, KR, 0, Z, ZP)
    v += kv_head * VH
    base = tile * (BH + BR)
    if DK and not LOOPED:
        values = _tile(v, rows, seen, VR, 0, WIDTH, BH)
        if BR > 0:
            more_values = _tile(v, rows, seen, VR, BH, WIDTH, BR)
    factor = scale * LOG2E if ACTIVATION == SOFTMAX else scale
    t_j = j
    if BIAS == ORIGINAL:
        t_j = _moment(k_position, k_first + tl.minimum(j, k_len - 1))
    if DROPOUT:
        seed_value = tl.load(seed)
    highest = tl.zeros((BM,), tl.int32)
    d_keys = tl.zeros((BN, ZP), tl.float32)
    d_values = tl.zeros((BN, BH), tl.float32)
    if BR > 0:
        d_more = tl.zeros((BN, BR), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        upstream = d_attended + head * WIDTH
        for m0 in range(first_query - shift, end_query - shift, BM):
            m = m0 + tl.arange(0, BM)
            q_rows = q_first + m
            i = m + shift
            sees = i < end_query  # at least one key of the block, as the loop begins with the first that does
            low, high = _interval(i, sees, k_len, start, window, chunk, CAUSAL, WINDOW, CHUNK)
            if LOOPED:  # before there are scores, which would have to be kept in registers meanwhile
                d_weights = tl.zeros((BM, BN), tl.float32)
                for h0 in range(0, WIDTH, BH + BR):
                    grads = _tile(upstream, q_rows, sees, HEADS * WIDTH, h0, WIDTH, BH)
                    values = _tile(v, rows, seen, VR, h0, WIDTH, BH)
                    d_weights = _dot_add(grads, tl.trans(values), d_weights, PRECISION)
                    if BR > 0:
                        grads = _tile(upstream, q_rows, sees, HEADS * WIDTH, h0 + BH, WIDTH, BR)
                        values = _tile(v, rows, seen, VR, h0 + BH, WIDTH, BR)
                        d_weights = _dot_add(grads, tl.trans(values), d_weights, PRECISION)
            queries = _tile(q + head * QH, q_rows, sees, QR, 0, Z, ZP)
            products = _dot(queries, tl.trans(keys), PRECISION)
            visible = (j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None])
            multiplier = factor
            if COUNTED:
                multiplier = (1.0 / tl.maximum(high - low + 1, 1).to(tl.float32))[:, None]
            scores = products * multiplier
            if BIAS != 0:
                t_i = i
                if BIAS == ORIGINAL:
                    t_i = _moment(q_position, q_first + tl.minimum(m, q_len - 1))
                bias, _ = _bias(table, distance, n0 - (m0 + shift), t_i[:, None], t_j[None, :], entries, window, BIAS)
                scores += bias * LOG2E if ACTIVATION == SOFTMAX else bias
            scores = tl.where(visible, scores, float("-inf"))
            largest = tl.zeros((BM,), tl.float32)
            share = largest
            if ACTIVATION == SOFTMAX:
                largest, share = _statistics(statistics, q_rows, sees, head, n_queries, HEADS)
            weights = _weights(scores, largest[:, None], share[:, None], ACTIVATION)
            if DROPOUT:
                kept = _kept(seed_value, q_rows[:, None], head, j[None, :], dropout)
            if not LOOPED:
                grads = _tile(upstream, q_rows, sees, HEADS * WIDTH, base, WIDTH, BH)
                if BR > 0:
                    more = _tile(upstream, q_rows, sees, HEADS * WIDTH, base + BH, WIDTH, BR)
            if DV:
                dropped = weights
                if DROPOUT:
                    dropped = tl.where(kept, weights / (1.0 - dropout), 0.0)
                dropped = tl.trans(dropped.to(grads.dtype))
                d_values = _dot_add(dropped, grads, d_values, PRECISION)
                if BR > 0:
                    d_more = _dot_add(dropped, more, d_more, PRECISION)
            if DK:
                if not LOOPED:
                    d_weights = _dot(grads, tl.trans(values), PRECISION)
                    if BR > 0:
                        d_weights = _dot_add(more, tl.trans(more_values), d_weights, PRECISION)
                if DROPOUT:
                    d_weights = tl.where(kept, d_weights / (1.0 - dropout), 0.0)
                part = tl.zeros((BM,), tl.float32)
                if ACTIVATION == SOFTMAX:
                    part = _deltas(delta, q_rows, sees, head, n_queries, HEADS, DELTAS)
                slopes = _slopes(scores, weights, d_weights, part[:, None], ACTIVATION)
                if BIAS == ORIGINAL:
                    highest = tl.maximum(highest, tl.max(tl.abs(slopes).to(tl.int32, bitcast=True), 1))
                if COUNTED:
                    slopes *= multiplier
                d_keys += _dot_slopes(tl.trans(slopes), queries, PRECISION)
    if SPLIT:
        rows = rows.to(tl.int64) + tl.program_id(2).to(tl.int64) * n_keys
    if DK:
        if not COUNTED:
            d_keys *= scale
        _put(dk + kv_head * Z, d_keys, rows, own, HEADS // GROUP * Z, 0, Z, ZP)
        if BIAS == ORIGINAL:
            tl.atomic_max(peak, tl.max(highest, 0), sem="relaxed")
    if DV:
        _put(dv + kv_head * WIDTH, d_values, rows, own, HEADS // GROUP * WIDTH, base, WIDTH, BH)
        if BR > 0:
            _put(dv + kv_head * WIDTH, d_more, rows, own, HEADS // GROUP * WIDTH, base + BH, WIDTH, BR)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "width"])
def d_queries_kernel(
    q, k, v, table, q_cu, k_cu, k_start, q_position, k_position, seed, statistics, delta, d_attended, dq, peak,
    partial, n_queries, n_keys, batch, window, chunk, entries, width, scale, dropout,
    QR: tl.constexpr, QH: tl.constexpr, KR: tl.constexpr, KH: tl.constexpr, VR: tl.constexpr, VH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, DELTAS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, COUNTED: tl.constexpr,
    PRECISION: tl.constexpr, OFFSETS: tl.constexpr, COPIES: tl.constexpr, SPAN: tl.constexpr, SPLIT: tl.constexpr,
    ONCE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A block of queries: their gradient, and what they add to the gradient of the table.

    SPLIT: of its share of the keys, and ``dq`` has a first dimension for the shares. For local biases ``partial
    (programs, heads, OFFSETS, SPAN)`` gets the sums along the diagonals of each tile; key blocks then start at ``m0 -
    window``. For original ones ``partial (COPIES, entries)`` is added to in integers.
    """
    program = tl.program_id(0)
    if CAUSAL:
        program = tl.num_programs(0) - 1 - program
    head = tl.program_id(1)
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
    base = m0 * 0
    if BIAS == LOCAL:
        base = i0 - window
    first_block = tl.maximum(block_low - base, 0) // BN
    if BIAS != LOCAL:
        base, first_block = block_low, m0 * 0

    factor = scale * LOG2E if ACTIVATION == SOFTMAX else scale
    if COUNTED:
        factor = (1.0 / tl.maximum(high - low + 1, 1).to(tl.float32))[:, None]
    queries = _tile(q + head * QH, rows, sees, QR, 0, Z, ZP)
    k += (head // GROUP) * KH
    v += (head // GROUP) * VH
    d_attended += head * WIDTH
    if TILES == 1:
        grads = _tile(d_attended, rows, sees, HEADS * WIDTH, 0, WIDTH, BH)
        if BR > 0:
            more_grads = _tile(d_attended, rows, sees, HEADS * WIDTH, BH, WIDTH, BR)
    part = tl.zeros((BM,), tl.float32)
    largest, share = part, part
    if ACTIVATION == SOFTMAX:
        largest, share = _statistics(statistics, rows, sees, head, n_queries, HEADS)
        part = _deltas(delta, rows, sees, head, n_queries, HEADS, DELTAS)
    t_i = i
    if BIAS == ORIGINAL:
        t_i = _moment(q_position, q_first + tl.minimum(m, q_len - 1))
        exponent, _ = _exponent(peak, width)
        units = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
        partial += (program % COPIES) * entries
    if BIAS == LOCAL:
        partial += (program * HEADS + head).to(tl.int64) * (OFFSETS * SPAN)
    if DROPOUT:
        seed_value = tl.load(seed)
    d_queries = tl.zeros((BM, ZP), tl.float32)
    first_key, end_key = base + first_block * BN, block_high + 1
    if SPLIT:
        first_key, end_key = _share(first_key, end_key, BN)
    for n0 in range(first_key, end_key, BN):
        j = n0 + tl.arange(0, BN)
        seen = (j >= block_low) & (j <= block_high)
        if TILES > 1:
            d_weights = tl.zeros((BM, BN), tl.float32)
            for h0 in range(0, WIDTH, BH + BR):
                grads = _tile(d_attended, rows, sees, HEADS * WIDTH, h0, WIDTH, BH)
                values = _tile(v, k_first + j, seen, VR, h0, WIDTH, BH)
                d_weights = _dot_add(grads, tl.trans(values), d_weights, PRECISION)
                if BR > 0:
                    grads = _tile(d_attended, rows, sees, HEADS * WIDTH, h0 + BH, WIDTH, BR)
                    values = _tile(v, k_first + j, seen, VR, h0 + BH, WIDTH, BR)
                    d_weights = _dot_add(grads, tl.trans(values), d_weights, PRECISION)
        keys = _tile(k, k_first + j, seen, KR, 0, Z, ZP)
        products = _dot(queries, tl.trans(keys), PRECISION)
        visible = (j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None])
        scores = products * factor
        if BIAS != 0:
            t_j = j
            if BIAS == ORIGINAL:
                t_j = _moment(k_position, k_first + tl.minimum(tl.maximum(j, block_low), block_high))
            bias, index = _bias(table, distance, n0 - i0, t_i[:, None], t_j[None, :], entries, window, BIAS)
            scores += bias * LOG2E if ACTIVATION == SOFTMAX else bias
        scores = tl.where(visible, scores, float("-inf"))
        weights = _weights(scores, largest[:, None], share[:, None], ACTIVATION)
        if TILES == 1:
            values = _tile(v, k_first + j, seen, VR, 0, WIDTH, BH)
            d_weights = _dot(grads, tl.trans(values), PRECISION)
            if BR > 0:
                values = _tile(v, k_first + j, seen, VR, BH, WIDTH, BR)
                d_weights = _dot_add(more_grads, tl.trans(values), d_weights, PRECISION)
        if DROPOUT:
            kept = _kept(seed_value, rows[:, None], head, j[None, :], dropout)
            d_weights = tl.where(kept, d_weights / (1.0 - dropout), 0.0)
        slopes = _slopes(scores, weights, d_weights, part[:, None], ACTIVATION)
        if BIAS == LOCAL:
            sums = _diagonals(slopes, BM, BN, SPAN)
            tl.store(partial + (n0 - base) // BN * SPAN + tl.arange(0, SPAN), sums)
        if BIAS == ORIGINAL:
            _count(partial, index, slopes * units, ONCE)
        if COUNTED:
            slopes *= factor
        d_queries += _dot_slopes(slopes, keys, PRECISION)
    if not COUNTED:
        d_queries *= scale
    if SPLIT:
        rows = rows.to(tl.int64) + tl.program_id(2).to(tl.int64) * n_queries
    _put(dq + head * Z, d_queries, rows, own, HEADS * Z, 0, Z, ZP)


@triton.jit(do_not_specialize=["splits"])
def add_kernel(parts, whole, size, splits, BLOCK: tl.constexpr):
    """``whole (size,)`` is the sum of ``parts (splits, size)``, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    inside = at < size
    place = parts + at
    for _ in range(splits):
        total += tl.load(place, mask=inside, other=0.0)
        place += size
    tl.store(whole + at, total.to(whole.dtype.element_ty), mask=inside)
