# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""From rows of packed sequences to scores, weights and their gradients, tile by tile: what all kernels share.

A program works on one block of rows of one sequence. Blocks are counted from the start of their sequence. Which
sequence a program belongs to is found on the device: sequence b owns the programs from ``cu[b] // BLOCK + b`` on, which
are enough for its rows, and those that have none left stop. Rows behind the last sequence form one more, without keys.

The keys that a query sees are one interval ``low .. high``, whatever the window, the chunk and causality.
"""

import torch
import triton
import triton.language as tl

from sma.ops.kernel import INTERPRETING

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

PTX = tl.constexpr(not INTERPRETING and torch.version.hip is None)
"""Whether inline assembly for NVIDIA's GPUs can be used."""

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
    """The share of a loop of this program; those along the third axis of the grid share it out evenly."""
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
def _number(table, index):
    """Numbers of a table of float32 at places that must all exist.

    ``tl.load`` has threads read neighbouring numbers, which then reach the threads that need them by shared memory.
    Here the thread that needs a number reads it.
    """
    if PTX:
        code: tl.constexpr = "{ .reg .b64 at; mad.wide.s32 at, $2, 4, $1; ld.global.nc.f32 $0, [at]; }"
        found = tl.inline_asm_elementwise(code, "=f,l,r", [table, index], tl.float32, is_pure=True, pack=1)
    else:
        found = tl.load(table + index)
    return found


@triton.jit
def _moment(position, rows):
    """Original positions (int64) of tokens that must all exist, or rather the lower 32 bits of them: that is enough for
    the differences between tokens that attend to each other.
    """
    if PTX:
        code: tl.constexpr = "{ .reg .b64 at; mad.wide.s32 at, $2, 8, $1; ld.global.nc.b32 $0, [at]; }"
        found = tl.inline_asm_elementwise(code, "=r,l,r", [position, rows], tl.int32, is_pure=True, pack=1)
    else:
        found = tl.load(position + rows).to(tl.int32)
    return found


@triton.jit
def _bias(table, distance, offset, t_i, t_j, entries, window, BIAS: tl.constexpr):
    """Biases of queries and keys, and where in the table they stand; any entry where the key is not visible.

    ``t_i`` and ``t_j`` are original positions, whose differences are int32. The key minus the query is ``distance +
    offset``, one the same for all tiles, the other for the whole tile: then addresses differ by constants.
    """
    if BIAS == ORIGINAL:
        last = (entries - 1) // 2
        index = tl.minimum(tl.maximum(t_j - t_i, -last), last) + last
    else:
        index = tl.minimum(tl.maximum(distance + (offset + (4 * window - 1)), 0), entries - 1)
    return _number(table, index), index


@triton.jit
def _kept(seed, row, head, j, dropout):
    """Which weights dropout keeps: a matter of the query's row, the head and the index of the key alone."""
    zero = (row + j) * 0
    bits, _, _, _ = tl.philox(seed, zero + j, zero + row, zero + head, zero)
    return tl.uint_to_uniform_float(bits) >= dropout


@triton.jit
def _statistics(statistics, rows, keep, head, n_queries, HEADS: tl.constexpr):
    """Of the softmax of some queries: the largest score, and one over the denominator; 0 where there is none."""
    at = statistics + head.to(tl.int64) * n_queries + rows
    largest = tl.load(at, mask=keep, other=0.0)
    return largest, tl.load(at + n_queries.to(tl.int64) * HEADS, mask=keep, other=0.0)


@triton.jit
def _weights(scores, largest, share, ACTIVATION: tl.constexpr):
    """Nothing where the score is minus infinity, which is what hidden keys get."""
    if ACTIVATION == SOFTMAX:
        weights = tl.exp2(scores - largest) * share
    elif ACTIVATION == RELU2:
        positive = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weights = positive * positive
    else:
        weights = 0.5 * (1.0 + tl.erf((scores - MEAN) / (DEVIATION * SQRT_2)))
    return weights


@triton.jit
def _slopes(scores, weights, d_weights, delta, ACTIVATION: tl.constexpr):
    """Gradient of the scores (natural units) from the one of the weights; nothing where keys are hidden."""
    if ACTIVATION == SOFTMAX:
        slopes = weights * (d_weights - delta)
    elif ACTIVATION == RELU2:
        slopes = 2.0 * tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL) * d_weights
    else:
        away = (scores - MEAN) / DEVIATION
        slopes = d_weights * tl.exp2(-0.5 * LOG2E * away * away) / (DEVIATION * SQRT_2PI)
    return slopes


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
