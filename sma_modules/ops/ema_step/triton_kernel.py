# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""A step of the average: norm, recurrence of all states, direct path and activation in one pass over the memory."""

import triton
import triton.language as tl

from sma.ops.combine.triton_kernel import silu
from sma.ops.row_norm.triton_kernel import affine


@triton.jit
def step_kernel(
    x, hidden, fresh, count, history, loss, drive, read, leaving, omega, norm_weight, norm_bias, live, position, out,
    slots, eps,
    D: tl.constexpr, N: tl.constexpr, VERSIONS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, CENTRED: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr, WIDTH: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``BD`` channels of one slot. The norm's statistics are computed by every program of a slot: x is small."""
    slot = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    own = d < D
    target = out + slot * D + d
    if tl.load(live + slot) != 0:
        at = tl.load(position + slot)
        now = tl.load(x + slot * D + d, mask=own, other=0.0).to(tl.float32)
        if NORM:
            every = tl.arange(0, WIDTH)
            row = tl.load(x + slot * D + every, mask=every < D, other=0.0).to(tl.float32)
            if CENTRED:
                mean = tl.sum(row, 0) / D
                row = tl.where(every < D, row - mean, 0.0)
                now = now - mean
            spread = tl.div_rn(tl.sum(row * row, 0), D * 1.0)
            now = now * tl.div_rn(1.0, tl.sqrt_rn(spread + eps))
            now = affine(now, norm_weight, norm_bias, d, D, WEIGHT_STRIDE, HAS_BIAS)
            now = now.to(x.dtype.element_ty).to(tl.float32)
        n = tl.arange(0, BN)
        cell = own[:, None] & (n < N)[None, :]
        coefficient = d[:, None] * N + n[None, :]
        before = ((at % VERSIONS) * slots + slot) * (D * N) + coefficient
        after = (((at + 1) % VERSIONS) * slots + slot) * (D * N) + coefficient
        lost = tl.load(loss + coefficient, mask=cell, other=0.0)
        entering = tl.load(drive + coefficient, mask=cell, other=0.0) * now[:, None]
        state = tl.load(hidden + before, mask=cell, other=0.0)
        state = state - lost * state + entering
        if TAPS > 0:
            oldest = history + (slot * ROWS + (at + (ROWS - TAPS)) % ROWS) * D + d
            gone = tl.load(oldest, mask=own, other=0.0).to(tl.float32)
            state -= gone[:, None] * tl.load(leaving + coefficient, mask=cell, other=0.0)
            tl.store(history + (slot * ROWS + at % ROWS) * D + d, now.to(history.dtype.element_ty), mask=own)
            new = tl.load(fresh + before, mask=cell, other=0.0)
            new = new - lost * new + entering
            counted = tl.load(count + (at % (VERSIONS + 1)) * slots + slot) + 1
            full = counted == TAPS
            state = tl.where(full, new, state)
            tl.store(fresh + after, tl.where(full, 0.0, new), mask=cell)
            if tl.program_id(1) == 0:
                tl.store(count + ((at + 1) % (VERSIONS + 1)) * slots + slot, tl.where(full, 0, counted))
        tl.store(hidden + after, state, mask=cell)
        y = tl.sum(state * tl.load(read + coefficient, mask=cell, other=0.0), 1)
        y += tl.load(omega + d, mask=own, other=0.0) * now
        if SILU:
            y = silu(y)
        tl.store(target, y.to(out.dtype.element_ty), mask=own)
    else:
        tl.store(target, tl.zeros((BD,), out.dtype.element_ty), mask=own)
