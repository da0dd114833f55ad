# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Both directions of the inputs of a gated attention unit, each one pass over memory."""

import triton
import triton.language as tl

from sma.ops.combine.triton_kernel import exp, silu

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def _silu_slope(x):
    s = tl.div_rn(1.0, 1.0 + exp(-x))
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def _turn(rows, position, keep, LOG2_THETA: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr):
    """Cosine and sine ``(n, ZP / 2)`` of every pair's angle, which is reduced in float64 to stay exact however large.

    What rounding the angle to float32 loses is put back by the first term of the Taylor series.
    """
    pair = tl.arange(0, ZP // 2).to(tl.float64)
    at = tl.load(position + rows, mask=keep, other=0).to(tl.float64)
    angle = at[:, None] * tl.exp2(pair * (-2.0 * LOG2_THETA / Z))[None, :]
    angle -= tl.floor(angle / TWO_PI + 0.5) * TWO_PI
    near = angle.to(tl.float32)
    rest = (angle - near.to(tl.float64)).to(tl.float32)
    cos, sin = tl.cos(near), tl.sin(near)
    return cos - rest * sin, sin + rest * cos


@triton.jit
def _rotate(x, cos, sin, BM: tl.constexpr, ZP: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (BM, ZP // 2, 2)))
    return tl.interleave(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit(do_not_specialize=["n_rows"])
def forward_kernel(
    mx, gamma, beta, position, q, k, v, r, n_rows,
    ROW: tl.constexpr, LOG2_THETA: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr, H: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """A block of rows."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    own = rows < n_rows
    column = tl.arange(0, ZP)
    real = column < Z
    keep = own[:, None] & real[None, :]
    at = rows[:, None] * Z + column[None, :]
    shared = silu(tl.load(mx + rows[:, None] * ROW + column[None, :], mask=keep, other=0.0).to(tl.float32))
    if position is not None:
        cos, sin = _turn(rows, position, own, LOG2_THETA, Z, ZP)
    for n in tl.static_range(2):
        scale = tl.load(gamma + n * Z + column, mask=real, other=0.0).to(tl.float32)
        shift = tl.load(beta + n * Z + column, mask=real, other=0.0).to(tl.float32)
        x = shared * scale[None, :] + shift[None, :]
        if position is not None:
            x = _rotate(x, cos, sin, BM, ZP)
        tl.store((q if n == 0 else k) + at, x.to(q.dtype.element_ty), mask=keep)
    for first in range(0, H, BH):
        feature = first + tl.arange(0, BH)
        inside = own[:, None] & (feature < H)[None, :]
        source = mx + rows[:, None] * ROW + Z + feature[None, :]
        target = rows[:, None] * H + feature[None, :]
        gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(source + H, mask=inside, other=0.0).to(tl.float32)
        tl.store(r + target, silu(gate).to(r.dtype.element_ty), mask=inside)
        tl.store(v + target, silu(value).to(v.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def backward_kernel(
    mx, gamma, beta, position, dq, dk, dv, dr, d_mx, partial, n_rows,
    ROW: tl.constexpr, LOG2_THETA: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr, H: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """A block of rows; ``partial (programs, 4, Z)`` gets its part of the gradients of gamma and beta."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    own = rows < n_rows
    column = tl.arange(0, ZP)
    real = column < Z
    keep = own[:, None] & real[None, :]
    at = rows[:, None] * Z + column[None, :]
    width: tl.constexpr = Z + 2 * H
    raw = tl.load(mx + rows[:, None] * ROW + column[None, :], mask=keep, other=0.0).to(tl.float32)
    shared = silu(raw)
    if position is not None:
        cos, sin = _turn(rows, position, own, LOG2_THETA, Z, ZP)
    d_shared = tl.zeros((BM, ZP), tl.float32)
    partial += tl.program_id(0).to(tl.int64) * (4 * Z)
    for n in tl.static_range(2):
        grad = tl.load((dq if n == 0 else dk) + at, mask=keep, other=0.0).to(tl.float32)
        if position is not None:
            grad = _rotate(grad, cos, -sin, BM, ZP)
        scale = tl.load(gamma + n * Z + column, mask=real, other=0.0).to(tl.float32)
        d_shared += grad * scale[None, :]
        tl.store(partial + n * Z + column, tl.sum(grad * shared, 0), mask=real)
        tl.store(partial + (2 + n) * Z + column, tl.sum(grad, 0), mask=real)
    d_raw = d_shared * _silu_slope(raw)
    tl.store(d_mx + rows[:, None] * width + column[None, :], d_raw.to(d_mx.dtype.element_ty), mask=keep)
    for first in range(0, H, BH):
        feature = first + tl.arange(0, BH)
        inside = own[:, None] & (feature < H)[None, :]
        source = mx + rows[:, None] * ROW + Z + feature[None, :]
        target = d_mx + rows[:, None] * width + Z + feature[None, :]
        grads = rows[:, None] * H + feature[None, :]
        gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(source + H, mask=inside, other=0.0).to(tl.float32)
        d_gate = tl.load(dr + grads, mask=inside, other=0.0).to(tl.float32)
        d_value = tl.load(dv + grads, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (d_gate * _silu_slope(gate)).to(d_mx.dtype.element_ty), mask=inside)
        tl.store(target + H, (d_value * _silu_slope(value)).to(d_mx.dtype.element_ty), mask=inside)
