"""Activation and gate, forward and backward, as Triton kernels.

Both read their inputs once and compute in float32. The backward kernel gives, from the same reads, the hidden values
again (for the gradient of the next matrix) and the column sums of its gradients (for those of the biases).
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def _normal(x, EXACT: tl.constexpr):
    """Distribution function and density of the normal distribution, the former to 16 bits unless EXACT.

    It is half of ``erfcx(|x| / sqrt(2)) exp(-x^2 / 2)`` below 0, and the density has the same exponential. The scaled
    complementary error function is a polynomial here, the one with the least largest relative error (1.5e-5) up to
    5.5, beyond which less than 2e-8 is left. erf takes so many instructions that they, not memory, would take the time.
    """
    exponential = tl.exp2(x * x * -0.7213475204444817)
    if EXACT:
        below = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    else:
        a = tl.minimum(tl.abs(x), 5.5)
        half = 1.76466337e-7 * a - 5.85588325e-6
        half = half * a + 8.63170466e-5
        half = half * a - 7.49529817e-4
        half = half * a + 4.30403191e-3
        half = half * a - 1.75017309e-2
        half = half * a + 5.31901743e-2
        half = half * a - 1.27006211e-1
        half = half * a + 2.47914076e-1
        half = half * a - 3.98641502e-1
        half = half * a + 4.99992316e-1
        tail = half * exponential
        below = tl.where(x > 0, 1.0 - tail, tail)
    return below, 0.3989422804014327 * exponential


@triton.jit
def _act(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Value and derivative; what is rounded to 16 bits afterwards does not have to be EXACT."""
    if ACTIVATION == "relu":
        # Written so that NaN stays NaN, as in PyTorch.
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        below, density = _normal(x, EXACT)
        value = x * below
        slope = below + x * density
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    return value, slope


@triton.jit
def activate_kernel(up, gate, out, n, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """``act(up)`` or ``act(gate) * up``, element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    a = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    if GATED:
        value, _ = _act(tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32), ACTIVATION, EXACT)
        value *= a
    else:
        value, _ = _act(a, ACTIVATION, EXACT)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def activate_backward_kernel(
    grad,
    up,
    gate,
    grad_up,
    grad_gate,
    hidden,
    other,
    sums,
    n_rows,
    D: tl.constexpr,
    D_OTHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HIDDEN: tl.constexpr,
    SUMS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of ``ROWS x BD`` values, BR rows at a time; their column sums, if there are SUMS, and those of
    ``other (rows, D_OTHER)``, which programs of their own add up, to ``sums (programs, everything)``.
    """
    EXACT: tl.constexpr = grad_up.dtype.element_ty == tl.float32
    OWN: tl.constexpr = (2 * D if GATED else D) if SUMS else 0
    COLUMNS: tl.constexpr = (D + BD - 1) // BD
    program, column = tl.program_id(0), tl.program_id(1)
    to = sums + program.to(tl.int64) * (OWN + D_OTHER)
    if D_OTHER > 0 and column >= COLUMNS:
        d = (column - COLUMNS) * BD + tl.arange(0, BD)
        total = tl.zeros((BR, BD), tl.float32)
        for start in range(0, ROWS, BR):
            r = program * ROWS + start + tl.arange(0, BR)
            inside = (r < n_rows)[:, None] & (d < D_OTHER)[None, :]
            at = r.to(tl.int64)[:, None] * D_OTHER + d[None, :]
            total += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(to + OWN + d, tl.sum(total, 0), mask=d < D_OTHER)
        return
    d = column * BD + tl.arange(0, BD)
    sum_up = tl.zeros((BR, BD), tl.float32)
    sum_gate = tl.zeros((BR, BD), tl.float32)
    for start in range(0, ROWS, BR):
        r = program * ROWS + start + tl.arange(0, BR)
        at = r.to(tl.int64)[:, None] * D + d[None, :]
        inside = (r < n_rows)[:, None] & (d < D)[None, :]
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            value, slope = _act(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION, EXACT)
            grad_b = dy * a * slope
            tl.store(grad_gate + at, grad_b.to(grad_gate.dtype.element_ty), mask=inside)
            sum_gate += grad_b
            grad_a = dy * value
            value *= a
        else:
            value, slope = _act(a, ACTIVATION, EXACT)
            grad_a = dy * slope
        tl.store(grad_up + at, grad_a.to(grad_up.dtype.element_ty), mask=inside)
        sum_up += grad_a
        if HIDDEN:
            tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=inside)
    if SUMS:
        tl.store(to + d, tl.sum(sum_up, 0), mask=d < D)
        if GATED:
            tl.store(to + D + d, tl.sum(sum_gate, 0), mask=d < D)
