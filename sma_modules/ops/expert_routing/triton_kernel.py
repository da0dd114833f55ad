"""Softmax, choice, weights and the sums of the losses in one Triton kernel, and their gradient in another."""

from __future__ import annotations

import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]


@triton.jit
def _softmax(logits, t, e, known, E: tl.constexpr):
    """Probabilities of the tokens ``t``, 0 outside, and their logsumexp."""
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    x = tl.load(logits + at, mask=known[:, None] & (e < E)[None, :], other=float("-inf"))
    x = tl.where(known[:, None], x, 0.0)
    most = tl.max(x, 1)
    power = tl.where((e < E)[None, :], tl.exp(x - most[:, None]), 0.0)
    total = tl.sum(power, 1)
    return power / total[:, None], most + tl.log(total)


@triton.jit
def choose_kernel(
    logits,
    expert_out,
    weight_out,
    shares,
    n_tokens,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    BT: tl.constexpr,
):
    """Experts and weights of BT tokens; ``shares (programs, E + 1)``: theirs in the means."""
    program = tl.program_id(0)
    t = program * BT + tl.arange(0, BT)
    e = tl.arange(0, E_PAD)
    known = t < n_tokens
    p, log_total = _softmax(logits, t, e, known, E)
    to = shares + program.to(tl.int64) * (E + 1)
    tl.store(to + e, tl.sum(tl.where(known[:, None], p, 0.0), 0) / n_tokens, mask=e < E)
    tl.store(to + E, tl.sum(tl.where(known, log_total * log_total, 0.0), 0) / n_tokens)

    left = tl.where((e < E)[None, :], p, -1.0)
    k = tl.arange(0, K_PAD)
    experts = tl.zeros((BT, K_PAD), tl.int32)
    weights = tl.zeros((BT, K_PAD), tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.max(left, 1)
        # The first of the best; where all are NaN none is, and any expert will do.
        expert = tl.min(tl.where(left == best[:, None], e[None, :], E_PAD), 1)
        expert = tl.where(expert < E, expert, i)
        left = tl.where(e[None, :] == expert[:, None], -1.0, left)
        experts = tl.where((k == i)[None, :], expert[:, None], experts)
        weights = tl.where((k == i)[None, :], best[:, None], weights)
    if RENORMALISE:
        weights /= tl.sum(weights, 1)[:, None]
    at, inside = t.to(tl.int64)[:, None] * TOP_K + k[None, :], known[:, None] & (k < TOP_K)[None, :]
    tl.store(expert_out + at, experts.to(tl.int64), mask=inside)
    tl.store(weight_out + at, weights, mask=inside)


@triton.jit
def choose_backward_kernel(
    logits,
    expert,
    grad_weight,
    grad_probability,
    grad_square,
    grad_logits,
    n_tokens,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    E_PAD: tl.constexpr,
    BT: tl.constexpr,
):
    """The gradient of the logits of BT tokens, from those of weights, mean probabilities and mean square."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, E_PAD)
    known = t < n_tokens
    p, log_total = _softmax(logits, t, e, known, E)
    of_p = tl.zeros((BT, E_PAD), tl.float32)
    chosen = tl.zeros((BT,), tl.float32)
    along = tl.zeros((BT,), tl.float32)
    hit = tl.zeros((BT, E_PAD), tl.float32)
    for i in tl.static_range(TOP_K):
        at = t.to(tl.int64) * TOP_K + i
        mine = e[None, :] == tl.load(expert + at, mask=known, other=0)[:, None]
        g = tl.load(grad_weight + at, mask=known, other=0.0)
        probability = tl.sum(tl.where(mine, p, 0.0), 1)
        chosen += probability
        along += g * probability
        of_p += tl.where(mine, g[:, None], 0.0)
        hit += tl.where(mine, 1.0, 0.0)
    if RENORMALISE:
        # w_i = p_i / s with s = sum_j p_j:  dp_i = (dw_i - sum_j dw_j w_j) / s.
        of_p = (of_p - hit * (along / chosen)[:, None]) / chosen[:, None]
    of_p += (tl.load(grad_probability + e, mask=e < E, other=0.0) / n_tokens)[None, :]
    grad = p * (of_p - tl.sum(p * of_p, 1)[:, None])
    grad += p * (tl.load(grad_square) * 2.0 * log_total / n_tokens)[:, None]
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(grad_logits + at, grad, mask=known[:, None] & (e < E)[None, :])
