# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Window attention on a GPU, in the manner of flash attention; the README derives what is not plain to see.

A program works on one block of rows of one sequence. Blocks are counted from the start of their sequence. Which
sequence a program belongs to is found on the device: sequence b owns the programs from ``cu[b] // BLOCK + b`` on, which
are enough for its rows, and those that have none left stop. Rows behind the last sequence form one more, without keys.

The keys that a query sees are one interval ``low .. high``, whatever the window, the chunk and causality.
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
RELU2 = tl.constexpr(1)
LAPLACE = tl.constexpr(2)
ORIGINAL = tl.constexpr(1)
LOCAL = tl.constexpr(2)

LOG2E = tl.constexpr(1.4426950408889634)
MEAN = tl.constexpr(0.707107)
DEVIATION = tl.constexpr(0.282095)
SQRT_2 = tl.constexpr(1.4142135623730951)
SQRT_2PI = tl.constexpr(2.5066282746310002)
FAR = tl.constexpr(1 << 30)
"""More than any index inside a sequence, and twice of it is still an int32."""
INFINITY_BITS = tl.constexpr(0x7F800000)

UNSPECIALISED = ["n_queries", "n_keys", "batch", "window", "chunk", "entries"]


@triton.jit
def _bound(cu, b, batch, rows):
    """First row of sequence b, within the rows there are whatever ``cu`` says; the end of all rows beyond ``batch``."""
    at = tl.load(cu + tl.minimum(b, batch))
    return tl.where(b > batch, rows, tl.minimum(tl.maximum(at, 0), rows).to(tl.int32))


@triton.jit
def _place(own_cu, other_cu, k_start, batch, own_rows, other_rows, program, BLOCK: tl.constexpr):
    """Rows of a program's sequence and of what it attends to (or is attended by), and the first row of its block."""
    b = program * 0
    end = b + batch + 1
    while end - b > 1:
        middle = (b + end) // 2
        before = _bound(own_cu, middle, batch, own_rows) // BLOCK + middle <= program
        b = tl.where(before, middle, b)
        end = tl.where(before, end, middle)
    first = _bound(own_cu, b, batch, own_rows)
    length = tl.maximum(_bound(own_cu, b + 1, batch, own_rows) - first, 0)
    other_first = _bound(other_cu, b, batch, other_rows)
    other_length = tl.maximum(_bound(other_cu, b + 1, batch, other_rows) - other_first, 0)
    other_length = tl.where(b < batch, other_length, 0)
    start = first.to(tl.int64) * 0
    if k_start is not None:
        start = tl.load(k_start + b, mask=b < batch, other=0)
    return first, length, other_first, other_length, start, (program - first // BLOCK - b) * BLOCK


@triton.jit
def _chunk_of(i, start, chunk):
    """Index, relative to ``start``, of the first token of the chunk of token ``i``."""
    a = i.to(tl.int64) + start
    down = tl.where(a < 0, -((chunk - 1 - a) // chunk), a // chunk)
    return tl.minimum(tl.maximum(down * chunk - start, -FAR), FAR).to(tl.int32)


@triton.jit
def _interval(i, own, k_len, start, window, chunk, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """First and last key that the queries aligned with keys ``i`` see; no key where ``own`` is False."""
    low = tl.zeros_like(i)
    high = tl.zeros_like(i) + (k_len - 1)
    if CAUSAL:
        high = tl.minimum(high, i)
    if WINDOW:
        low = tl.maximum(low, i - window)
        high = tl.minimum(high, i + window)
    if CHUNK:
        first = _chunk_of(i, start, chunk)
        low = tl.maximum(low, first)
        high = tl.minimum(high, first + chunk - 1)
    return low, tl.where(own, high, -1)


@triton.jit
def _share(first, end, BLOCK: tl.constexpr):
    """What of a loop falls to this one of the programs along the third axis of the grid, who share it out evenly."""
    blocks = (tl.maximum(end - first, 0) + BLOCK - 1) // BLOCK
    split, splits = tl.program_id(2), tl.num_programs(2)
    return first + split * blocks // splits * BLOCK, tl.minimum(end, first + (split + 1) * blocks // splits * BLOCK)


@triton.jit
def _tile(x, rows, keep, row_stride, first, width: tl.constexpr, BLOCK: tl.constexpr):
    """Features ``first ..`` of some rows ``(n, BLOCK)``, zero where there are none."""
    columns = first + tl.arange(0, BLOCK)
    at = x + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    if width % BLOCK == 0:
        return tl.load(at, mask=keep[:, None], other=0.0)
    return tl.load(at, mask=keep[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _put(x, values, rows, keep, row_stride, first, width: tl.constexpr, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK)
    at = x + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=keep[:, None] & (columns < width)[None, :])


@triton.jit
def _since(position, rows, keep, reference):
    """Original positions counted from ``reference``; those of tokens that attend to each other lie within 2^30."""
    distance = tl.load(position + rows, mask=keep, other=0) - reference
    return tl.minimum(tl.maximum(distance, -FAR), FAR).to(tl.int32)


@triton.jit
def _entry(distance, offset, t_i, t_j, entries, window, BIAS: tl.constexpr):
    """Where in the table the bias of a query and a key stands; garbage where the key is not visible.

    The key minus the query is ``distance + offset``, one the same for all tiles, the other for the whole tile: then
    addresses differ by constants.
    """
    if BIAS == ORIGINAL:
        last = (entries - 1) // 2
        return tl.minimum(tl.maximum(t_j - t_i, -last), last) + last
    return distance + (offset + (4 * window - 1))


@triton.jit
def _kept(seed, row, head, j, dropout):
    """Which weights dropout keeps: a matter of the query's row, the head and the index of the key alone."""
    zero = (row + j) * 0
    bits, _, _, _ = tl.philox(seed, zero + j, zero + row, zero + head, zero)
    return tl.uint_to_uniform_float(bits) >= dropout


@triton.jit
def _scores(products, factor, index, visible, table, present, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """For softmax in units of log 2."""
    scores = products * factor
    if BIAS != 0:
        # Inside a branch, which is always taken, the compiler leaves out copying these single numbers ahead of time to
        # shared memory, whose addresses would fill the registers.
        bias = tl.zeros(products.shape, tl.float32)
        if present:
            bias = tl.load(table + index, mask=visible, other=0.0).to(tl.float32)
        scores += bias * LOG2E if ACTIVATION == SOFTMAX else bias
    return scores


@triton.jit
def _statistics(statistics, rows, keep, head, n_queries, HEADS: tl.constexpr):
    """Of the softmax of some queries: the largest score, and one over the denominator; 0 where there is none."""
    at = statistics + head.to(tl.int64) * n_queries + rows
    largest = tl.load(at, mask=keep, other=0.0)
    return largest, tl.load(at + n_queries.to(tl.int64) * HEADS, mask=keep, other=0.0)


@triton.jit
def _weights(scores, visible, largest, share, ACTIVATION: tl.constexpr):
    if ACTIVATION == SOFTMAX:
        weights = tl.exp2(scores - largest) * share
    elif ACTIVATION == RELU2:
        positive = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weights = positive * positive
    else:
        weights = 0.5 * (1.0 + tl.erf((scores - MEAN) / (DEVIATION * SQRT_2)))
    return tl.where(visible, weights, 0.0)


@triton.jit
def _slopes(scores, weights, d_weights, visible, delta, ACTIVATION: tl.constexpr):
    """Gradient of the scores (natural units) from the one of the weights."""
    if ACTIVATION == SOFTMAX:
        slopes = weights * (d_weights - delta)
    elif ACTIVATION == RELU2:
        slopes = 2.0 * tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL) * d_weights
    else:
        away = (scores - MEAN) / DEVIATION
        slopes = d_weights * tl.exp2(-0.5 * LOG2E * away * away) / (DEVIATION * SQRT_2PI)
    return tl.where(visible, slopes, 0.0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # the interpreter takes bfloat16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _dot_add(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _dot_slopes(slopes, x, PRECISION: tl.constexpr):
    """Product with gradients of scores, which may lie below what float16 can hold."""
    if x.dtype == tl.float16:
        # To the nearest TF32: left to themselves tensor cores cut off. What is not finite stays as it is.
        nearest = ((slopes.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        nearest = tl.where(tl.abs(slopes) < float("inf"), nearest, slopes)
        return tl.dot(nearest, x.to(tl.float32), input_precision="tf32")
    return _dot(slopes.to(x.dtype), x, PRECISION)


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
    BN: tl.constexpr, BH: tl.constexpr,
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

    keys = _tile(k + kv_head * KH, rows, own, KR, 0, Z, ZP)
    v += kv_head * VH
    if DK and not LOOPED:
        values = _tile(v, rows, own, VR, 0, WIDTH, BH)
    factor = scale * LOG2E if ACTIVATION == SOFTMAX else scale
    t_j = j
    reference = start * 0
    if BIAS == ORIGINAL:
        reference = tl.load(k_position + k_first + n0)
        t_j = _since(k_position, rows, own, reference)
    if DROPOUT:
        seed_value = tl.load(seed)
    highest = n0 * 0
    d_keys = tl.zeros((BN, ZP), tl.float32)
    d_values = tl.zeros((BN, BH), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for m0 in range(first_query - shift, end_query - shift, BM):
            m = m0 + tl.arange(0, BM)
            q_rows = q_first + m
            i0 = m0 + shift
            i = m + shift
            low, high = _interval(i, m < q_len, k_len, start, window, chunk, CAUSAL, WINDOW, CHUNK)
            sees = (low <= high) & (high >= n0) & (low <= last)
            if LOOPED:  # before there are scores, which would have to be kept in registers meanwhile
                d_weights = tl.zeros((BM, BN), tl.float32)
                for h0 in range(0, WIDTH, BH):
                    grads = _tile(d_attended + head * WIDTH, q_rows, sees, HEADS * WIDTH, h0, WIDTH, BH)
                    values = _tile(v, rows, own, VR, h0, WIDTH, BH)
                    d_weights = _dot_add(grads, tl.trans(values), d_weights, PRECISION)
            queries = _tile(q + head * QH, q_rows, sees, QR, 0, Z, ZP)
            products = _dot(queries, tl.trans(keys), PRECISION)
            visible = (j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None])
            t_i = i
            if BIAS == ORIGINAL:
                t_i = _since(q_position, q_rows, sees, reference)
            index = _entry(distance, n0 - i0, t_i[:, None], t_j[None, :], entries, window, BIAS)
            multiplier = factor
            if COUNTED:
                multiplier = (1.0 / tl.maximum(high - low + 1, 1).to(tl.float32))[:, None]
            scores = _scores(products, multiplier, index, visible, table, m0 < q_len, BIAS, ACTIVATION)
            largest = tl.zeros((BM,), tl.float32)
            share = largest
            if ACTIVATION == SOFTMAX:
                largest, share = _statistics(statistics, q_rows, sees, head, n_queries, HEADS)
            weights = _weights(scores, visible, largest[:, None], share[:, None], ACTIVATION)
            if DROPOUT:
                kept = _kept(seed_value, q_rows[:, None], head, j[None, :], dropout)
            if not LOOPED:
                grads = _tile(d_attended + head * WIDTH, q_rows, sees, HEADS * WIDTH, tile * BH, WIDTH, BH)
            if DV:
                dropped = weights
                if DROPOUT:
                    dropped = tl.where(kept, weights / (1.0 - dropout), 0.0)
                d_values = _dot_add(tl.trans(dropped.to(grads.dtype)), grads, d_values, PRECISION)
            if DK:
                if not LOOPED:
                    d_weights = _dot(grads, tl.trans(values), PRECISION)
                if DROPOUT:
                    d_weights = tl.where(kept, d_weights / (1.0 - dropout), 0.0)
                part = tl.zeros((BM,), tl.float32)
                if ACTIVATION == SOFTMAX:
                    part = _deltas(delta, q_rows, sees, head, n_queries, HEADS, DELTAS)
                slopes = _slopes(scores, weights, d_weights, visible, part[:, None], ACTIVATION)
                if BIAS == ORIGINAL:
                    highest = tl.maximum(highest, tl.max(tl.max(tl.abs(slopes).to(tl.int32, bitcast=True), 1), 0))
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
            tl.atomic_max(peak, highest, sem="relaxed")
    if DV:
        _put(dv + kv_head * WIDTH, d_values, rows, own, HEADS // GROUP * WIDTH, tile * BH, WIDTH, BH)


@triton.jit
def _exponent(peak, room):
    """Power of two that makes an integer of ``room`` bits of the largest gradient, given by its bits as a float."""
    bits = tl.load(peak)
    return tl.minimum(tl.maximum(room - ((bits >> 23) - 126), -126), 126), bits


@triton.jit
def _diagonals(x, BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr):
    """Sums ``(SPAN,)`` of a tile along its diagonals: entry ``c - r + BM - 1`` is the one of row r and column c."""
    r = tl.arange(0, BM)[:, None]
    c = tl.arange(0, SPAN)[None, :] - (BM - 1) + r
    inside = (c >= 0) & (c < BN)
    return tl.sum(tl.where(inside, tl.gather(x, tl.where(inside, c, 0), 1), 0.0), 0)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "room"])
def d_queries_kernel(
    q, k, v, table, q_cu, k_cu, k_start, q_position, k_position, seed, statistics, delta, d_attended, dq, peak,
    partial, n_queries, n_keys, batch, window, chunk, entries, room, scale, dropout,
    QR: tl.constexpr, QH: tl.constexpr, KR: tl.constexpr, KH: tl.constexpr, VR: tl.constexpr, VH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, DELTAS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, COUNTED: tl.constexpr,
    PRECISION: tl.constexpr, OFFSETS: tl.constexpr, COPIES: tl.constexpr, SPAN: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
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
    part = tl.zeros((BM,), tl.float32)
    largest, share = part, part
    if ACTIVATION == SOFTMAX:
        largest, share = _statistics(statistics, rows, sees, head, n_queries, HEADS)
        part = _deltas(delta, rows, sees, head, n_queries, HEADS, DELTAS)
    t_i = i
    reference = start * 0
    if BIAS == ORIGINAL:
        reference = tl.load(q_position + q_first + m0)
        t_i = _since(q_position, rows, own, reference)
        exponent, _ = _exponent(peak, room)
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
            for h0 in range(0, WIDTH, BH):
                grads = _tile(d_attended, rows, sees, HEADS * WIDTH, h0, WIDTH, BH)
                values = _tile(v, k_first + j, seen, VR, h0, WIDTH, BH)
                d_weights = _dot_add(grads, tl.trans(values), d_weights, PRECISION)
        keys = _tile(k, k_first + j, seen, KR, 0, Z, ZP)
        products = _dot(queries, tl.trans(keys), PRECISION)
        visible = (j[None, :] >= low[:, None]) & (j[None, :] <= high[:, None])
        t_j = j
        if BIAS == ORIGINAL:
            t_j = _since(k_position, k_first + j, seen, reference)
        index = _entry(distance, n0 - i0, t_i[:, None], t_j[None, :], entries, window, BIAS)
        scores = _scores(products, factor, index, visible, table, n0 <= block_high, BIAS, ACTIVATION)
        weights = _weights(scores, visible, largest[:, None], share[:, None], ACTIVATION)
        if TILES == 1:
            values = _tile(v, k_first + j, seen, VR, 0, WIDTH, BH)
            d_weights = _dot(grads, tl.trans(values), PRECISION)
        if DROPOUT:
            kept = _kept(seed_value, rows[:, None], head, j[None, :], dropout)
            d_weights = tl.where(kept, d_weights / (1.0 - dropout), 0.0)
        slopes = _slopes(scores, weights, d_weights, visible, part[:, None], ACTIVATION)
        if BIAS == LOCAL:
            sums = _diagonals(slopes, BM, BN, SPAN)
            tl.store(partial + (n0 - base) // BN * SPAN + tl.arange(0, SPAN), sums)
        if BIAS == ORIGINAL:
            whole = tl.where(tl.abs(slopes) < float("inf"), slopes * units, 0.0).to(tl.int64)
            tl.atomic_add(partial + index, whole, mask=visible & (whole != 0), sem="relaxed")
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


@triton.jit(do_not_specialize=["programs", "window", "entries"])
def local_table_kernel(
    partial, d_table, programs, window, entries, OFFSETS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the diagonals of all tiles, in a fixed order. ``programs`` counts heads too."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    diagonal = entry - (3 * window - BM)
    first = tl.maximum(tl.min(diagonal, 0) - (SPAN - 1), 0) // BN
    end = tl.minimum(tl.maximum(tl.max(diagonal, 0), -1) // BN + 1, OFFSETS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for offset in range(first, end):
        at = diagonal - offset * BN
        inside = (at >= 0) & (at < SPAN)
        for row in range(0, programs, ROWS):
            rows = row + tl.arange(0, ROWS)
            where = (rows[:, None].to(tl.int64) * OFFSETS + offset) * SPAN + at[None, :]
            total += tl.load(partial + where, mask=(rows < programs)[:, None] & inside[None, :], other=0.0)
    tl.store(d_table + entry, tl.sum(total, 0).to(d_table.dtype.element_ty), mask=entry < entries)


@triton.jit(do_not_specialize=["entries", "room"])
def original_table_kernel(partial, peak, d_table, entries, room, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the copies, exactly, and scales back. All of it is NaN if any gradient of a score was not finite."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for copy in tl.static_range(COPIES):
        total += tl.load(partial + copy * entries + entry, mask=entry < entries, other=0)
    exponent, bits = _exponent(peak, room)
    back = ((1023 - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    sums = (total.to(tl.float64) * back).to(tl.float32)
    sums = tl.where(bits >= INFINITY_BITS, float("nan"), sums)
    tl.store(d_table + entry, sums.to(d_table.dtype.element_ty), mask=entry < entries)
