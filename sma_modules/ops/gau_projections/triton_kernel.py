# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""A step's products with the weights of a gated attention unit, each with all that follows it.

A program has a few output features, and with them a few rows of a weight, which it reads once for all slots. Where no
slot is active, programs of the unit end before they have read any.
"""

import triton
import triton.language as tl

from sma.ops.combine.triton_kernel import silu

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def product(
    x, weight, bias, rows, keep, first, K: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """``x W^T + b`` in float32 ``(BM, BN)``, for features ``first ..`` of the OUT that are there."""
    n = first + tl.arange(0, BN)
    there = n < OUT
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=keep[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(weight + n[None, :] * K + k[:, None], mask=there[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total + tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _turned(
    x, position, rows, keep, pair, LOG2_THETA: tl.constexpr, Z: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """``x (BM, BN)`` with its pairs of features turned; angles as in the kernel of ``gau_inputs``."""
    at = tl.load(position + rows, mask=keep, other=0).to(tl.float64)
    angle = at[:, None] * tl.exp2(pair.to(tl.float64) * (-2.0 * LOG2_THETA / Z))[None, :]
    angle -= tl.floor(angle / TWO_PI + 0.5) * TWO_PI
    near = angle.to(tl.float32)
    rest = (angle - near.to(tl.float64)).to(tl.float32)
    cos, sin = tl.cos(near), tl.sin(near)
    cos, sin = cos - rest * sin, sin + rest * cos
    even, odd = tl.split(tl.reshape(x, (BM, BN // 2, 2)))
    return tl.interleave(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def projection_kernel(
    m, skip_weight, skip_bias, mx_weight, mx_bias, gamma, beta, position, active, skip, q, k, v, r, slots,
    D: tl.constexpr, OUT: tl.constexpr, Z: tl.constexpr, H: tl.constexpr, LOG2_THETA: tl.constexpr,
    SKIPS: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program p: one of SKIPS tiles of the skip, of SHARED tiles of Z, or of twice WIDE tiles of gate and values."""
    tile = tl.program_id(0)
    rows = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    there = rows < slots
    column = tl.arange(0, BN)
    if tile < SKIPS:
        n = tile * BN + column
        path = product(m, skip_weight, skip_bias, rows, there, tile * BN, D, OUT, BM, BN, BK)
        mask = there[:, None] & (n < OUT)[None, :]
        tl.store(skip + rows[:, None] * OUT + n[None, :], path.to(skip.dtype.element_ty), mask=mask)
    else:
        keep = there & (tl.load(active + rows, mask=there, other=0) != 0)
        if tl.max(keep.to(tl.int32), 0) > 0:
            if tile < SKIPS + SHARED:
                first = (tile - SKIPS) * BN
                n = first + column
                real = n < Z
                z = silu(product(m, mx_weight, mx_bias, rows, keep, first, D, Z, BM, BN, BK))
                for which in tl.static_range(2):
                    scale = tl.load(gamma + which * Z + n, mask=real, other=0.0).to(tl.float32)
                    shift = tl.load(beta + which * Z + n, mask=real, other=0.0).to(tl.float32)
                    y = z * scale[None, :] + shift[None, :]
                    if position is not None:
                        pair = first // 2 + tl.arange(0, BN // 2)
                        y = _turned(y, position, rows, keep, pair, LOG2_THETA, Z, BM, BN)
                    target = (q if which == 0 else k) + rows[:, None] * Z + n[None, :]
                    tl.store(target, y.to(q.dtype.element_ty), mask=keep[:, None] & real[None, :])
            else:
                of_values = tile >= SKIPS + SHARED + WIDE
                first = (tile - SKIPS - SHARED - tl.where(of_values, WIDE, 0)) * BN
                n = first + column
                offset = Z + tl.where(of_values, H, 0)
                weight, bias = mx_weight + offset.to(tl.int64) * D, mx_bias + offset
                wide = silu(product(m, weight, bias, rows, keep, first, D, H, BM, BN, BK)).to(v.dtype.element_ty)
                mask = keep[:, None] & (n < H)[None, :]
                if of_values:
                    tl.store(v + rows[:, None] * H + n[None, :], wide, mask=mask)
                else:
                    tl.store(r + rows[:, None] * H + n[None, :], wide, mask=mask)


@triton.jit
def output_kernel(
    x, weight, bias, active, confidence, skip, residual, out, slots,
    H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BN features of ``silu(skip + confidence * (x W^T + b) + residual)``."""
    first = tl.program_id(0) * BN
    rows = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    there = rows < slots
    keep = there & (tl.load(active + rows, mask=there, other=0) != 0)
    n = first + tl.arange(0, BN)
    mask = there[:, None] & (n < D)[None, :]
    place = rows[:, None] * D + n[None, :]
    total = tl.load(skip + place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    if tl.max(keep.to(tl.int32), 0) > 0:
        y = product(x, weight, bias, rows, keep, first, H, D, BM, BN, BK)
        share = tl.load(confidence + rows, mask=keep, other=0.0).to(tl.float32)
        total += tl.where(keep[:, None], y * share[:, None], 0.0)
    tl.store(out + place, silu(total).to(out.dtype.element_ty), mask=mask)
