"""window_attention: checks, and the choice of a backend."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ConfigError, ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma_modules.ops.window_attention import eager, reference
from sma_modules.ops.window_attention.blocks import FEWEST_QUERIES, MAXIMUM_QK
from sma_modules.ops.window_attention.types import Activation, Bias, Inputs, Layout, Rule, Signature


def window_attention(
    q: Float[Tensor, "queries heads z"],
    k: Float[Tensor, "keys kv_heads z"],
    v: Float[Tensor, "keys kv_heads h"],
    *,
    q_cu: Int[Tensor, " bounds"],
    k_cu: Int[Tensor, " bounds"],
    causal: bool,
    window: int | None,
    max_q: int,
    max_k: int,
    chunk: int | None = None,
    activation: Activation = "softmax",
    bias: Bias = "none",
    bias_table: Float[Tensor, " entries"] | None = None,
    q_position: Int[Tensor, " queries"] | None = None,
    k_position: Int[Tensor, " keys"] | None = None,
    k_start: Int[Tensor, " batch"] | None = None,
    dropout: float = 0.0,
    gate: Float[Tensor, "queries heads h"] | None = None,
) -> Float[Tensor, "queries heads h"]:
    """Local attention over packed sequences (MEGA, arXiv 2209.10655; SeqBoat, arXiv 2306.11197, section 4).

    Query i of a sequence is aligned with key ``i + len_k - len_q``: keys in front of the first query are what a stream
    remembers. With i and j counting keys of one sequence, key j is visible from i if ``i - window <= j <= i`` (causal)
    or ``|i - j| <= window``, and, with ``chunk``, if ``i // chunk == j // chunk``. Scores are

    * softmax: ``q.k / sqrt(z) + bias``, weights their softmax over visible keys, computed in float32 at least;
    * relu2: ``q.k / d + bias``, weights ``relu(score)^2``;
    * laplace: the same scores, weights ``0.5 (1 + erf((score - 0.707107) / (0.282095 sqrt(2))))``;

    where d is ``window`` (causal), ``2 window``, or without a window the number of keys visible from i. The bias is
    ``T[P - 1 + clamp(t_j - t_i, 1 - P, P - 1)]`` with original positions t ("original"), or ``T[4 window - 1 + j - i]``
    ("local", P = 3 window); the same for all heads. A query that sees no key gives 0.

    Args:
        q: ``(Q, H, z)`` queries, sequences one after the other.
        k: ``(K, G, z)`` keys, with G dividing H: each key head serves H / G query heads (arXiv 2305.13245).
        v: ``(K, G, h)`` values.
        q_cu: ``(B + 1,)`` int64, sequence b owns the query rows ``q_cu[b]:q_cu[b + 1]``.
        k_cu: ``(B + 1,)`` the same for keys. Pass ``q_cu`` itself when no keys are in front: it saves work.
        causal: no key after the query.
        window: at least 1, or None for no bound.
        max_q: upper bound of the queries of a sequence, on the host.
        max_k: upper bound of the keys of a sequence.
        chunk: at least 1, or None.
        activation: "softmax", "relu2" or "laplace".
        bias: "none", "original" (needs both positions) or "local" (needs a window).
        bias_table: ``(2P - 1,)``; None for bias "none".
        q_position: ``(Q,)`` int64 original positions.
        k_position: ``(K,)`` int64.
        k_start: ``(B,)`` int64 how many keys of the stream came before the first one here (chunks count them); None: 0.
        dropout: probability that a weight is dropped; those kept are scaled up.
        gate: ``(Q, H, h)`` what the result is multiplied with, in the dtype of ``v``; None for nothing.

    Returns:
        ``(Q, H, h)`` in the dtype of ``v``, also under autocast.

    Raises:
        ShapeError: tensors do not fit each other, are not floating point, or lengths do not sum to the number of rows.
        ConfigError: an option is out of range or does not fit another one.

    Example:
        >>> import torch
        >>> cu = torch.tensor([0, 3, 5])
        >>> x = torch.randn(5, 1, 4)
        >>> window_attention(x, x, x, q_cu=cu, k_cu=cu, causal=True, window=2, max_q=3, max_k=3).shape
        torch.Size([5, 1, 4])
    """
    inputs = Inputs(q, k, v, gate, bias_table)
    layout = Layout(q_cu, k_cu, k_start, q_position, k_position, max_q, max_k, q_cu is k_cu)
    rule = Rule(causal, window, chunk, activation, bias, dropout)
    _check_rule(rule, bias_table)
    _check_tensors(inputs, layout, rule)
    return OP.run(_signature(inputs, layout, rule), inputs, layout, rule)  # type: ignore[no-any-return]


def _check_rule(rule: Rule, table: Tensor | None) -> None:
    _, window, chunk, activation, bias, dropout = rule
    for name, value in (("window", window), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ConfigError(f"window_attention: {name} must be at least 1 or None, got {value}")
    if activation not in ("softmax", "relu2", "laplace"):
        raise ConfigError(f"window_attention: activation must be 'softmax', 'relu2' or 'laplace', got {activation!r}")
    if bias not in ("none", "original", "local"):
        raise ConfigError(f"window_attention: bias must be 'none', 'original' or 'local', got {bias!r}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"window_attention: dropout must be in [0, 1), got {dropout}")
    if (table is None) != (bias == "none"):
        raise ConfigError(
            f"window_attention: bias_table goes with bias 'original' or 'local' only, got bias {bias!r} "
            f"and bias_table {None if table is None else tuple(table.shape)}"
        )
    if bias == "local" and window is None:
        raise ConfigError("window_attention: bias 'local' needs a window, got None")
    if table is not None and (table.dim() != 1 or table.numel() % 2 == 0):
        raise ShapeError(f"window_attention: bias_table must be (2P - 1,), got {tuple(table.shape)}")
    if table is not None and bias == "local" and window is not None and table.numel() != 6 * window - 1:
        raise ShapeError(
            f"window_attention: bias_table must have {6 * window - 1} entries for bias 'local' and window {window}, "
            f"got {table.numel()}"
        )


def _check_tensors(inputs: Inputs, layout: Layout, rule: Rule) -> None:
    q, k, v, gate, _ = inputs
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or not x.is_floating_point():
            raise ShapeError(
                f"window_attention: {name} must be floating point (rows, heads, width), got {x.dtype} {tuple(x.shape)}"
            )
    if q.dtype != k.dtype or k.dtype != v.dtype:
        raise ShapeError(f"window_attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    shared = q.shape[1] == k.shape[1] or (k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0)
    if q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2] or not shared:
        raise ShapeError(
            "window_attention: q (Q, H, z), k (K, G, z) and v (K, G, h) must agree, with G dividing H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if gate is not None and (gate.shape != (*q.shape[:2], v.shape[2]) or gate.dtype != v.dtype):
        raise ShapeError(
            f"window_attention: gate must be {v.dtype} {(*q.shape[:2], v.shape[2])}, "
            f"got {gate.dtype} {tuple(gate.shape)}"
        )
    _check_rows(q.shape[0], layout.q_cu, layout.q_position, "q")
    if not layout.aligned or layout.k_position is not layout.q_position or k.shape[0] != q.shape[0]:
        _check_rows(k.shape[0], layout.k_cu, layout.k_position, "k")
    if layout.q_cu.shape != layout.k_cu.shape:
        raise ShapeError(
            "window_attention: q_cu and k_cu must have the same length, "
            f"got {layout.q_cu.numel()} and {layout.k_cu.numel()}"
        )
    if rule.bias == "original" and (layout.q_position is None or layout.k_position is None):
        raise ConfigError("window_attention: bias 'original' needs q_position and k_position, got None")
    if layout.k_start is not None and layout.k_start.shape != layout.q_cu[1:].shape:
        raise ShapeError(
            f"window_attention: k_start must be ({layout.q_cu.numel() - 1},), got {tuple(layout.k_start.shape)}"
        )


def _check_rows(rows: int, cu: Tensor, position: Tensor | None, name: str) -> None:
    if cu.dim() != 1 or cu.numel() < 1 or cu.dtype != torch.int64:
        raise ShapeError(f"window_attention: {name}_cu must be int64 (B + 1,), got {cu.dtype} {tuple(cu.shape)}")
    if position is not None and position.shape != (rows,):
        raise ShapeError(f"window_attention: {name}_position must be ({rows},), got {tuple(position.shape)}")
    # Reading values on an accelerator would synchronise with the device.
    readable = cu.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and (int(cu[0]) != 0 or int(cu[-1]) != rows or bool((cu.diff() < 0).any())):
        raise ShapeError(
            f"window_attention: {name}_cu must ascend from 0 to the {rows} rows of {name}, got {cu.tolist()}"
        )


def _signature(inputs: Inputs, layout: Layout, rule: Rule) -> Signature:
    (rows, heads, width), q = inputs.q.shape, inputs.q
    return Signature(q.device, q.dtype, width, not (heads and width and inputs.v.shape[2]), rows < FEWEST_QUERIES)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.key_width > MAXIMUM_QK:
        return f"the kernel takes queries and keys of at most {MAXIMUM_QK} features, got {signature.key_width}"
    if signature.empty:
        return "the kernel needs at least one head and one feature of queries and values"
    return why_not_triton(signature.device, signature.dtype)


def _why_not_worth_it(signature: Signature) -> str | None:
    if signature.few_queries:
        return f"the eager backend is faster for fewer than {FEWEST_QUERIES} queries"
    return why_not_interpreted(signature)


OP = Op("window_attention", _signature)
OP.register(
    "triton",
    lazy("sma_modules.ops.window_attention.launch", "window_attention"),
    priority=10,
    applies=_why_not_triton,
    pays=_why_not_worth_it,
)
OP.register("eager", eager.window_attention)
OP.register("reference", reference.window_attention, priority=90)
