"""Attention over packed sequences, each query seeing a window or a chunk of the keys of its own sequence."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ConfigError, ShapeError
from sma.ops.backend import Op, forced_backend, without_autocast
from sma.ops.kernel import why_not_triton_on
from sma_modules.ops.window_attention.blocks import FEWEST_QUERIES, MAXIMUM_QK
from sma_modules.ops.window_attention.eager import window_attention_eager
from sma_modules.ops.window_attention.reference import window_attention_reference
from sma_modules.ops.window_attention.rule import Activation, Bias, Layout, Rule

__all__ = ["OP", "Activation", "Bias", "window_attention"]

OP = Op("window_attention")


def _why_not_triton(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, table: Tensor | None, layout: Layout, rule: Rule
) -> str | None:
    reason = why_not_triton_on(q)
    if reason is not None:
        return reason
    if q.shape[2] > MAXIMUM_QK:
        return f"the kernel takes queries and keys of at most {MAXIMUM_QK} features, got {q.shape[2]}"
    if not q.shape[1] or not q.shape[2] or not v.shape[2]:
        return f"the kernel needs at least one head and feature, got q {tuple(q.shape)} and v {tuple(v.shape)}"
    if q.shape[0] < FEWEST_QUERIES and forced_backend() != "triton":
        return f"the eager backend is faster for fewer than {FEWEST_QUERIES} queries, got {q.shape[0]}"
    return None


@OP.backend("triton", priority=10, applies=_why_not_triton)
def _triton(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, table: Tensor | None, layout: Layout, rule: Rule
) -> Tensor:
    from sma_modules.ops.window_attention.launch import window_attention_triton

    return window_attention_triton(q, k, v, gate, table, layout, rule)


OP.backend("eager", priority=50)(window_attention_eager)
OP.backend("reference", priority=90)(window_attention_reference)


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
    _check_options(causal, window, chunk, activation, bias, bias_table, dropout)
    _check_tensors(q, k, v, gate)
    _check_rows(q.shape[0], q_cu, q_position, "q")
    if k_cu is not q_cu or k_position is not q_position or k.shape[0] != q.shape[0]:
        _check_rows(k.shape[0], k_cu, k_position, "k")
    if q_cu.shape != k_cu.shape:
        raise ShapeError(
            f"window_attention: q_cu and k_cu must have the same length, got {q_cu.numel()} and {k_cu.numel()}"
        )
    if bias == "original" and (q_position is None or k_position is None):
        raise ConfigError("window_attention: bias 'original' needs q_position and k_position, got None")
    if k_start is not None and k_start.shape != q_cu[1:].shape:
        raise ShapeError(f"window_attention: k_start must be ({q_cu.numel() - 1},), got {tuple(k_start.shape)}")
    layout = Layout(q_cu, k_cu, k_start, q_position, k_position, max_q, max_k)
    rule = Rule(causal, window, chunk, activation, bias, dropout)
    with without_autocast(q.device):
        out: Tensor = OP(q, k, v, gate, bias_table, layout, rule)
    return out


def _check_options(
    causal: bool,
    window: int | None,
    chunk: int | None,
    activation: str,
    bias: str,
    table: Tensor | None,
    dropout: float,
) -> None:
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
        raise ConfigError(f"window_attention: bias_table goes with bias 'original' or 'local' only, got bias {bias!r}")
    if bias == "local" and window is None:
        raise ConfigError("window_attention: bias 'local' needs a window, got None")
    if table is not None and (table.dim() != 1 or table.numel() % 2 == 0):
        raise ShapeError(f"window_attention: bias_table must be (2P - 1,), got {tuple(table.shape)}")
    if table is not None and bias == "local" and window is not None and table.numel() != 6 * window - 1:
        raise ShapeError(
            f"window_attention: bias_table must have {6 * window - 1} entries for bias 'local' and window {window}, "
            f"got {table.numel()}"
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or not x.is_floating_point():
            raise ShapeError(
                f"window_attention: {name} must be floating point (rows, heads, width), got {x.dtype} {tuple(x.shape)}"
            )
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
    if q.dtype != k.dtype or k.dtype != v.dtype:
        raise ShapeError(f"window_attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _check_rows(rows: int, cu: Tensor, position: Tensor | None, name: str) -> None:
    if cu.dim() != 1 or cu.numel() < 1 or cu.dtype != torch.int64:
        raise ShapeError(f"window_attention: {name}_cu must be int64 (B + 1,), got {cu.dtype} {tuple(cu.shape)}")
    if position is not None and position.shape != (rows,):
        raise ShapeError(f"window_attention: {name}_position must be ({rows},), got {tuple(position.shape)}")
    looking = cu.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would wait for the device
    if looking and (int(cu[0]) != 0 or int(cu[-1]) != rows or bool((cu.diff() < 0).any())):
        raise ShapeError(
            f"window_attention: {name}_cu must ascend from 0 to the {rows} rows of {name}, got {cu.tolist()}"
        )
