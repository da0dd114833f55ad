"""ring_attention: checks, and the choice of a backend."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.errors import ConfigError, ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma_modules.ops.ring_attention import eager, reference
from sma_modules.ops.ring_attention.types import Query, Ring, Signature
from sma_modules.ops.window_attention.types import Activation, Bias, Inputs, Rule

WIDEST_KEY = 256
"""Most features of a key: the kernel holds a block of keys in registers."""


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
    place, in slots that are active; slots that are live and not active keep theirs. Shapes are fixed and nothing
    synchronises with the device.

    Args:
        q: ``(S, H, z)``; if rotary, already rotated, like the keys.
        k: ``(S, G, z)`` with G dividing H.
        v: ``(S, G, h)``.
        ring: the tokens activated before; its keys and values have the dtype of ``v``.
        active: ``(S,)`` slots that attend; only live ones.
        live: ``(S,)`` slots that take a token.
        position: ``(S,)`` int64: tokens that each slot has taken before, see :class:`sma.steppers.StepContext`.
        at: ``(S,)`` int64: the original positions, to be kept and for bias "original"; ``position`` if None.
        window: at least 1, or None for no bound but the chunk's.
        chunk: at least 1, or None.
        activation: "softmax", "relu2" or "laplace".
        bias: "none", "original" or "local".
        bias_table: ``(2P - 1,)``; None for bias "none".
        gate: ``(S, H, h)`` factor of the result, or None.

    Returns:
        ``(S, H, h)`` in the dtype of ``v``, zero in slots that are not active.

    Raises:
        ShapeError: tensors do not fit each other or the ring.
        ConfigError: the ring holds fewer tokens than are to be visible.
    """
    inputs = Inputs(q, k, v, gate, bias_table)
    rule = Rule(True, window, chunk, activation, bias, 0.0)
    query = Query(inputs, active, live, position, position if at is None else at, rule)
    _check(inputs, rule, ring)
    return OP.chosen(_signature(query, ring)).run(query, ring)  # type: ignore[no-any-return]


def _check(inputs: Inputs, rule: Rule, ring: Ring) -> None:
    q, k, v, _, table = inputs
    slots, heads = q.shape[:2]
    fits = k.shape[:2] == v.shape[:2] and k.shape[1] > 0 and heads % k.shape[1] == 0
    if not fits or ring.keys.shape[2:] != k.shape[1:] or ring.values.shape[2:] != v.shape[1:]:
        raise ShapeError(
            f"ring_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree with a ring of "
            f"{tuple(ring.keys.shape)} and {tuple(ring.values.shape)}"
        )
    if ring.keys.shape[0] != slots:
        raise ShapeError(f"ring_attention: the ring has {ring.keys.shape[0]} slots, there are {slots} tokens")
    reach = rule.reach
    if reach is None or reach > ring.reach:
        raise ConfigError(
            f"ring_attention: the ring holds {ring.reach} tokens, got window {rule.window} and chunk {rule.chunk}"
        )
    if (table is None) != (rule.bias == "none"):
        raise ConfigError(
            f"ring_attention: bias_table goes with bias 'original' or 'local' only, got bias {rule.bias!r} "
            f"and bias_table {None if table is None else tuple(table.shape)}"
        )


def _signature(query: Query, ring: Ring) -> Signature:
    q, v = query.inputs.q, query.inputs.v
    return Signature(q.device, q.dtype, q.shape[2], q.numel() == 0 or v.numel() == 0)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.key_width > WIDEST_KEY:
        return f"the kernel takes keys of at most {WIDEST_KEY} features, got {signature.key_width}"
    if signature.empty:
        return "there is nothing to compute"
    return why_not_triton(signature.device, signature.dtype)


OP = Op("ring_attention", _signature)
OP.register(
    "triton",
    lazy("sma_modules.ops.ring_attention.launch", "ring_attention"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.ring_attention)
OP.register("reference", reference.ring_attention, priority=90)
