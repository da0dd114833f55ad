# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""A query of every active slot against its ring: partial results of spans of tokens, then their sum.

A program has one slot, one query head, one span of distances and some features of the values. Programs of slots that
are not active, and of spans that nothing visible is in, end at once.
"""

import triton
import triton.language as tl

from sma.ops.combine.triton_kernel import exp

SOFTMAX = tl.constexpr(0)
RELU2 = tl.constexpr(1)
LAPLACE = tl.constexpr(2)
ORIGINAL = tl.constexpr(1)
LOCAL = tl.constexpr(2)
MEAN = tl.constexpr(0.707107)
SPREAD = tl.constexpr(0.282095 * 1.4142135623730951)


@triton.jit
def _visible(number, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """How many tokens the one of this number sees, itself included."""
    seen = number + 1
    if WINDOW > 0:
        seen = tl.minimum(seen, WINDOW + 1)
    if CHUNK > 0:
        seen = tl.minimum(seen, number % CHUNK + 1)
    return seen


@triton.jit
def span_kernel(
    q, k, v, gate, table, keys, values, positions, counts, active, live, position, where, best, total, partial, out,
    slots, scale,
    H: tl.constexpr, G: tl.constexpr, Z: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, VERSIONS: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr,
    SPANS: tl.constexpr, BT: tl.constexpr, BZ: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Weights of BT tokens and BF features of their weighted sum; and, once, the new token's place in the ring."""
    head = tl.program_id(0).to(tl.int64)
    slot = head // H
    shared = (head % H) // (H // G)  # the key head
    span = tl.program_id(1)
    block = tl.program_id(2)
    f = block * BF + tl.arange(0, BF)
    wide = f < F
    at = tl.load(position + slot)
    own = tl.load(counts + (at % VERSIONS) * slots + slot)
    is_active = tl.load(active + slot) != 0
    first = (span == 0) & (head % (H // G) == 0)
    if (span == 0) & (head % H == 0) & (block == 0) & (tl.load(live + slot) != 0):
        tl.store(counts + ((at + 1) % VERSIONS) * slots + slot, own + tl.where(is_active, 1, 0))
    if is_active:
        z = tl.arange(0, BZ)
        narrow = z < Z
        own_row = own % ROWS
        here = tl.load(where + slot)
        distance = span * BT + tl.arange(0, BT)
        seen = distance < _visible(own, WINDOW, CHUNK)
        if span * BT < _visible(own, WINDOW, CHUNK):
            row = (own - distance + ROWS) % ROWS
            row = tl.where(seen, row, 0)
            old = seen & (distance > 0)
            new = distance == 0
            key = tl.load(
                keys + ((slot * ROWS + row) * G + shared)[:, None] * Z + z[None, :],
                mask=old[:, None] & narrow[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            fresh = tl.load(k + (slot * G + shared) * Z + z, mask=narrow, other=0.0)
            key = tl.where(new[:, None], fresh.to(tl.float32)[None, :], key)
            query = tl.load(q + head * Z + z, mask=narrow, other=0.0).to(tl.float32)
            scores = tl.sum(key * query[None, :], 1)
            if (ACTIVATION == SOFTMAX) | (WINDOW > 0):
                scores *= scale
            else:
                scores = tl.div_rn(scores, tl.zeros((BT,), tl.float32) + _visible(own, WINDOW, CHUNK).to(tl.float32))
            if BIAS == ORIGINAL:
                then = tl.load(positions + slot * ROWS + row, mask=old, other=0)
                apart = tl.minimum(tl.maximum(tl.where(new, 0, then - here), -LAST), LAST)
                scores += tl.load(table + LAST + apart, mask=seen, other=0.0).to(tl.float32)
            if BIAS == LOCAL:
                scores += tl.load(table + 4 * WINDOW - 1 - distance, mask=seen, other=0.0).to(tl.float32)
            largest = 0.0
            if ACTIVATION == SOFTMAX:
                largest = tl.max(tl.where(seen, scores, -float("inf")), 0)
                weights = exp(scores - largest)
            elif ACTIVATION == RELU2:
                positive = tl.maximum(scores, 0.0)
                weights = positive * positive
            else:
                weights = 0.5 * (1.0 + tl.erf((scores - MEAN) / SPREAD))
            weights = tl.where(seen, weights, 0.0)
            value = tl.load(
                values + ((slot * ROWS + row) * G + shared)[:, None] * F + f[None, :],
                mask=old[:, None] & wide[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            mine = tl.load(v + (slot * G + shared) * F + f, mask=wide, other=0.0)
            value = tl.where(new[:, None], mine.to(tl.float32)[None, :], value)
            result = tl.sum(value * weights[:, None], 0)
            if SPANS == 1:
                if ACTIVATION == SOFTMAX:
                    result = tl.div_rn(result, tl.zeros((BF,), tl.float32) + tl.sum(weights, 0))
                if gate is not None:
                    result *= tl.load(gate + head * F + f, mask=wide, other=0.0).to(tl.float32)
                tl.store(out + head * F + f, result.to(out.dtype.element_ty), mask=wide)
            else:
                tl.store(partial + (head * SPANS + span) * F + f, result, mask=wide)
                if (ACTIVATION == SOFTMAX) & (block == 0):
                    tl.store(best + head * SPANS + span, largest)
                    tl.store(total + head * SPANS + span, tl.sum(weights, 0))
            if first:
                # No program reads this row: its old token is not visible to any query.
                tl.store(values + ((slot * ROWS + own_row) * G + shared) * F + f, mine, mask=wide)
                if block == 0:
                    tl.store(keys + ((slot * ROWS + own_row) * G + shared) * Z + z, fresh, mask=narrow)
                    if head % H == 0:
                        tl.store(positions + slot * ROWS + own_row, here)
    elif SPANS == 1:
        tl.store(out + head * F + f, tl.zeros((BF,), out.dtype.element_ty), mask=wide)


@triton.jit
def sum_kernel(
    counts, gate, active, position, best, total, partial, out, slots,
    H: tl.constexpr, F: tl.constexpr, VERSIONS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    ACTIVATION: tl.constexpr, SPANS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """BF features of one query head: the spans, in a fixed order."""
    head = tl.program_id(0).to(tl.int64)
    slot = head // H
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    wide = f < F
    if tl.load(active + slot) != 0:
        at = tl.load(position + slot)
        own = tl.load(counts + (at % VERSIONS) * slots + slot)
        span = tl.arange(0, BS)
        there = span * BT < _visible(own, WINDOW, CHUNK)
        parts = tl.load(
            partial + (head * SPANS + span)[:, None] * F + f[None, :], mask=there[:, None] & wide[None, :], other=0.0
        )
        if ACTIVATION == SOFTMAX:
            largest = tl.load(best + head * SPANS + span, mask=there, other=-float("inf"))
            share = tl.where(there, exp(largest - tl.max(largest, 0)), 0.0)
            norm = tl.sum(share * tl.load(total + head * SPANS + span, mask=there, other=0.0), 0)
            result = tl.div_rn(tl.sum(parts * share[:, None], 0), tl.zeros((BF,), tl.float32) + norm)
        else:
            result = tl.sum(parts, 0)
        if gate is not None:
            result *= tl.load(gate + head * F + f, mask=wide, other=0.0).to(tl.float32)
        tl.store(out + head * F + f, result.to(out.dtype.element_ty), mask=wide)
    else:
        tl.store(out + head * F + f, tl.zeros((BF,), out.dtype.element_ty), mask=wide)
