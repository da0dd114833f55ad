"""Attention of one token of every sequence to a ring of the tokens activated before it: a step of decoding."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.errors import ConfigError, ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import why_not_triton_on
from sma_modules.ops.ring_attention.eager import ring_attention_eager
from sma_modules.ops.ring_attention.reference import ring_attention_reference
from sma_modules.ops.ring_attention.ring import Query, Ring
from sma_modules.ops.window_attention.rule import Activation, Bias, Rule

__all__ = ["OP", "Ring", "ring_attention"]

OP = Op("ring_attention")
WIDEST_KEY = 256
"""Most features of a key: the kernel holds a block of keys in registers."""


def _why_not_triton(query: Query, ring: Ring) -> str | None:
    reason = why_not_triton_on(query.q)
    if reason is not None:
        return reason
    if query.q.shape[2] > WIDEST_KEY:
        return f"the kernel takes keys of at most {WIDEST_KEY} features, got {query.q.shape[2]}"
    if query.q.numel() == 0 or query.v.numel() == 0:
        return "there is nothing to compute"
    return None


@OP.backend("triton", priority=10, applies=_why_not_triton)
def _triton(query: Query, ring: Ring) -> Tensor:
    from sma_modules.ops.ring_attention.launch import ring_attention_triton

    return ring_attention_triton(query, ring)


OP.backend("eager", priority=50)(ring_attention_eager)
OP.backend("reference", priority=90)(ring_attention_reference)


def ring_attention(
    q: Float[Tensor, "slots heads z"],
    k: Float[Tensor, "slots kv_heads z"],
    v: Float[Tensor, "slots kv_heads h"],
    ring: Ring,
    *,
    active: Bool[Tensor, " slots"],
    live: Bool[Tensor, " slots"],
    position: Int[Tensor, " slots"],
    at: Int[Tensor, " slots"] | None = None,
    window: int | None,
    chunk: int | None = None,
    activation: Activation = "softmax",
    bias: Bias = "none",
    bias_table: Float[Tensor, " entries"] | None = None,
    gate: Float[Tensor, "slots heads h"] | None = None,
) -> Float[Tensor, "slots heads h"]:
    """Put a token of every active slot into the ring and attend from it to what is visible there.

    What is visible, and the weights, are those of :func:`~sma_modules.ops.window_attention.window_attention` with
    ``causal=True``: a token sees itself and the ``window`` activated ones before it, of its chunk. The ring changes in
    place, in slots that are active; slots that are live and not active go on with what they have; shapes are fixed and
    nothing is read back from the device.

    Args:
        q: ``(S, H, z)``; if rotary, already rotated, like the keys.
        k: ``(S, G, z)`` with G dividing H.
        v: ``(S, G, h)``.
        ring: what was activated before; its keys and values have the dtype of ``v``.
        active: ``(S,)`` who attends; only live slots.
        live: ``(S,)`` who takes a token at all.
        position: ``(S,)`` int64: tokens that each slot has taken before, see :class:`sma.steppers.StepContext`.
        at: ``(S,)`` int64: the original positions, to be kept and for bias "original"; ``position`` if None.
        window: at least 1, or None for no bound but the chunk's.
        chunk: at least 1, or None.
        activation: "softmax", "relu2" or "laplace".
        bias: "none", "original" or "local".
        bias_table: ``(2P - 1,)``; None for bias "none".
        gate: ``(S, H, h)`` what the result is multiplied with; None for nothing.

    Returns:
        ``(S, H, h)`` in the dtype of ``v``, zero in slots that are not active.

    Raises:
        ShapeError: tensors do not fit each other or the ring.
        ConfigError: the ring is smaller than what is to be visible.
    """
    slots, heads = q.shape[:2]
    fits = k.shape[:2] == v.shape[:2] and k.shape[1] > 0 and heads % k.shape[1] == 0
    if not fits or ring.keys.shape[2:] != k.shape[1:] or ring.values.shape[2:] != v.shape[1:]:
        raise ShapeError(
            f"ring_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree with a ring of "
            f"{tuple(ring.keys.shape)} and {tuple(ring.values.shape)}"
        )
    if ring.keys.shape[0] != slots:
        raise ShapeError(f"ring_attention: the ring has {ring.keys.shape[0]} slots, there are {slots} tokens")
    bounds = [bound for bound in (window, None if chunk is None else chunk - 1) if bound is not None]
    if not bounds or min(bounds) > ring.reach:
        raise ConfigError(f"ring_attention: the ring holds {ring.reach} tokens, got window {window} and chunk {chunk}")
    if (bias_table is None) != (bias == "none"):
        raise ConfigError(f"ring_attention: bias_table goes with bias 'original' or 'local' only, got bias {bias!r}")
    rule = Rule(True, window, chunk, activation, bias, 0.0)
    out: Tensor = OP(
        Query(q, k, v, gate, bias_table, active, live, position, position if at is None else at, rule), ring
    )
    return out
