"""The kernels of window attention as operators, and their gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sma.ops.kernel import INTERPRETING, draw_seed, kernel
from sma.transforms import once_differentiable
from sma_modules.ops.window_attention import blocks
from sma_modules.ops.window_attention import triton_kernel as kernels
from sma_modules.ops.window_attention.types import Inputs, Layout, Rule

_ACTIVATIONS = {"softmax": 0, "relu2": 1, "laplace": 2}
_BIASES = {"none": 0, "original": 1, "local": 2}
_LARGEST = 1 << 30  # a window or chunk beyond this is as good as none


def _rows(x: Tensor) -> Tensor:
    """``x (rows, heads, width)`` with strides that depend on the sizes of the model only: they are constants."""
    return x if x.stride(2) == 1 and x.stride(1) <= x.stride(0) else x.contiguous()


class _Saved(NamedTuple):
    """What both kernels of the backward pass read besides the inputs."""

    seed: Tensor | None
    statistics: Tensor
    delta: Tensor | None
    d_attended: Tensor
    peak: Tensor | None


def _shared(inputs: Inputs, rule: Rule) -> dict[str, Any]:
    """The constants that every kernel takes."""
    q, k, v, _, _ = inputs
    wide = q.dtype == torch.float32
    counted = rule.activation != "softmax" and rule.divisor is None
    return {
        "QR": q.stride(0),
        "QH": q.stride(1) if q.shape[1] > 1 else 0,
        "KR": k.stride(0),
        "KH": k.stride(1) if k.shape[1] > 1 else 0,
        "VR": v.stride(0),
        "VH": v.stride(1) if v.shape[1] > 1 else 0,
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "Z": q.shape[2],
        "ZP": blocks.padded(q.shape[2]),
        "WIDTH": v.shape[2],
        "CAUSAL": rule.causal,
        "WINDOW": rule.window is not None,
        "CHUNK": rule.chunk is not None,
        "ACTIVATION": _ACTIVATIONS[rule.activation],
        "BIAS": _BIASES[rule.bias],
        "DROPOUT": rule.dropout > 0,
        "COUNTED": counted,
        "PRECISION": "interpreted" if INTERPRETING else blocks.FLOAT32_PRECISION if wide else "tf32",
    }


def _tile(tile: blocks.Blocks) -> dict[str, int]:
    return {
        "BM": tile.queries,
        "BN": tile.keys,
        "BH": tile.features,
        "BR": tile.rest,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _numbers(inputs: Inputs, layout: Layout, rule: Rule) -> tuple[int, ...]:
    """Rows, sequences, bounds and entries, as every kernel takes them."""
    window, chunk = min(rule.window or 0, _LARGEST), min(rule.chunk or 0, _LARGEST)
    entries = 0 if inputs.table is None else inputs.table.numel()
    return inputs.q.shape[0], inputs.k.shape[0], layout.q_cu.numel() - 1, window, chunk, entries


def _scale(q: Tensor, rule: Rule) -> float:
    if rule.activation == "softmax":
        return float(q.shape[2] ** -0.5)
    return 1.0 if rule.divisor is None else 1.0 / rule.divisor


def _loop(own: int, other: int, length: int, rule: Rule) -> int:
    """Tiles of ``other`` rows that a block of ``own`` rows meets in a sequence of ``length``."""
    if rule.reach is not None:
        length = min(length, own + rule.reach * (1 if rule.causal else 2))
    return -(-length // other)


def _parts(whole: Tensor, splits: int) -> Tensor:
    """What the splits write to: the gradient itself, or a float32 summand of it each."""
    return whole if splits == 1 else whole.new_empty(splits, *whole.shape, dtype=torch.float32)


def _add(parts: Tensor, whole: Tensor) -> None:
    if parts is not whole and whole.numel():
        size = whole.numel()
        kernels.add_kernel[(-(-size // 512),)](parts, whole, size, parts.shape[0], BLOCK=512)


def _inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, table: Tensor | None) -> Inputs:
    return Inputs(_rows(q), _rows(k), _rows(v), None if gate is None else _rows(gate), table)


def _layout(
    q_cu: Tensor, k_cu: Tensor | None, k_start: Tensor | None, q_position: Tensor | None, k_position: Tensor | None
) -> Layout:
    """None stands for the same as that of the queries: the compiler takes no tensor twice."""
    k_position = q_position if k_position is None else k_position
    return Layout(q_cu, q_cu if k_cu is None else k_cu, k_start, q_position, k_position, 0, 0, k_cu is None)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    gate, save = args[0], args[-1]
    out = v.new_empty(q.shape[0], q.shape[1], v.shape[2])
    statistics = q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)
    return out, statistics, torch.empty_like(out) if save and gate is not None else v.new_empty(0)


@kernel("window_attention", fake=_fake_forward)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    table: Tensor | None,
    q_cu: Tensor,
    k_cu: Tensor | None,
    k_start: Tensor | None,
    q_position: Tensor | None,
    k_position: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int,
    chunk: int,
    activation: str,
    bias: str,
    dropout: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output ``(Q, H, h)``, the statistics of the softmax ``(2, H, Q)``, and, if a backward pass will need it
    (``save``) and it is not the output itself, what is gated.
    """
    inputs = _inputs(q, k, v, gate, table)
    q, k, v, gate, _ = inputs
    layout = _layout(q_cu, k_cu, k_start, q_position, k_position)
    rule = Rule(causal, window or None, chunk or None, activation, bias, dropout)  # type: ignore[arg-type]
    n_queries, heads = q.shape[:2]
    width = v.shape[2]
    out, statistics, attended = _fake_forward(q, k, v, gate, save)
    tile = blocks.forward_blocks(q.shape[2], width, q.dtype, rule.reach, table is not None)
    tiles = tile.tiles(width)
    numbers = _numbers(inputs, layout, rule)
    kernels.attend_kernel[n_queries // tile.queries + numbers[2] + 1, heads * tiles](
        q, k, v, gate, table, layout.q_cu, layout.k_cu, layout.k_start, layout.q_position, layout.k_position, seed,
        out, statistics, attended if attended.numel() else None, *numbers, _scale(q, rule), rule.dropout,
        **_shared(inputs, rule),
        GR=0 if gate is None else gate.stride(0),
        GH=0 if gate is None else gate.stride(1),
        TILES=tiles,
        **_tile(tile),
    )  # fmt: skip
    return out, statistics, attended


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, table: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_gate = v.new_empty(0) if gate is None else v.new_empty(gate.shape)
    d_table = v.new_empty(0) if table is None else torch.empty_like(table)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_gate, d_table


@kernel("window_attention_backward", fake=_fake_backward)
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    table: Tensor | None,
    q_cu: Tensor,
    k_cu: Tensor | None,
    k_start: Tensor | None,
    q_position: Tensor | None,
    k_position: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor,
    attended: Tensor | None,
    causal: bool,
    window: int,
    chunk: int,
    activation: str,
    bias: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate and table; empty for what was not given. ``attended`` is the output before the gate;
    it is not read, and may be None, without a gate and a softmax.
    """
    inputs, dout = _inputs(q, k, v, gate, table), dout.contiguous()
    layout = _layout(q_cu, k_cu, k_start, q_position, k_position)
    rule = Rule(causal, window or None, chunk or None, activation, bias, dropout)  # type: ignore[arg-type]
    d_gate, d_attended, delta = None, dout, None
    if gate is not None or activation == "softmax":
        assert attended is not None
        d_gate, d_attended, delta = _ungate(dout, attended, inputs.gate, activation == "softmax")
    # The largest gradient of a score has to be known before they are added up in integers.
    peak = q.new_zeros(1, dtype=torch.int32) if bias == "original" else None
    saved = _Saved(seed, statistics, delta, d_attended, peak)
    dk, dv = _d_keys(inputs, layout, rule, saved)
    dq, d_table = _d_queries(inputs, layout, rule, saved)
    return dq, dk, dv, v.new_empty(0) if d_gate is None else d_gate, v.new_empty(0) if d_table is None else d_table


def _ungate(
    dout: Tensor, attended: Tensor, gate: Tensor | None, softmax: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of the gate and of what is gated, and for a softmax the sum of gradient times output ``(1, H, Q)``."""
    n_queries, heads, width = attended.shape
    delta = attended.new_empty(1, heads, n_queries, dtype=torch.float32) if softmax else None
    d_gate = None if gate is None else torch.empty_like(attended)
    d_attended = dout if gate is None else torch.empty_like(attended)
    features = min(blocks.padded(width), 128)
    kernels.ungate_kernel[(max(-(-n_queries * heads // 16), 1),)](
        dout, attended, None if gate is None else gate.contiguous(), d_gate, None if gate is None else d_attended,
        delta, n_queries, HEADS=heads, WIDTH=width, BM=16, BH=features,
    )  # fmt: skip
    return d_gate, d_attended, delta


def _d_keys(inputs: Inputs, layout: Layout, rule: Rule, saved: _Saved) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values: in one pass, or in one pass each."""
    (q, k, v, _, table), (seed, statistics, delta, d_attended, peak) = inputs, saved
    heads, width = k.shape[1], v.shape[2]
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    numbers = _numbers(inputs, layout, rule)
    length = q.shape[0] // max(numbers[2], 1)  # the mean: none is known
    for tile, for_keys, for_values in blocks.d_keys_passes(q.shape[2], width, q.dtype, table is not None):
        tiles = tile.tiles(width)
        grid = k.shape[0] // tile.keys + numbers[2] + 1, heads * (tiles if for_values else 1)
        splits = blocks.splits(grid[0] * grid[1], tile.warps, _loop(tile.keys, tile.queries, length, rule))
        dk_parts, dv_parts = _parts(dk, splits if for_keys else 1), _parts(dv, splits if for_values else 1)
        kernels.d_keys_kernel[(*grid, splits)](
            q, k, v, table, layout.q_cu, layout.k_cu, layout.k_start, layout.q_position, layout.k_position, seed,
            statistics, delta, d_attended, dk_parts, dv_parts, peak, *numbers, _scale(q, rule), rule.dropout,
            **_shared(inputs, rule), TILES=tiles, DELTAS=1 if delta is None else delta.shape[0],
            DK=for_keys, DV=for_values, SPLIT=splits > 1, **_tile(tile),
        )  # fmt: skip
        _add(dk_parts, dk)
        _add(dv_parts, dv)
    return dk, dv


def _d_queries(inputs: Inputs, layout: Layout, rule: Rule, saved: _Saved) -> tuple[Tensor, Tensor | None]:
    """Gradients of queries and table."""
    (q, k, v, _, table), (seed, statistics, delta, d_attended, peak) = inputs, saved
    n_queries, heads = q.shape[:2]
    tile = blocks.d_queries_blocks(q.shape[2], v.shape[2], q.dtype, table is not None)
    numbers = _numbers(inputs, layout, rule)
    programs, span = n_queries // tile.queries + numbers[2] + 1, n_queries if rule.window is None else 2 * rule.window
    offsets, bits, partial = 1, 0, None
    if rule.bias == "local":
        assert rule.window is not None
        offsets = -(-(tile.queries + (1 if rule.causal else 2) * rule.window) // tile.keys)
        partial = q.new_zeros(programs, heads, offsets, tile.diagonals, dtype=torch.float32)
    elif rule.bias == "original":
        # No more terms than pairs can meet in one entry, whose sum must stay below 2^62.
        pairs = max(n_queries * heads, 1) * max(min(k.shape[0], span + 1), 1)
        bits = min(61 - pairs.bit_length(), 30)
        partial = q.new_zeros(blocks.TABLE_COPIES, numbers[5], dtype=torch.int64)
    loop = _loop(tile.queries, tile.keys, k.shape[0] // max(numbers[2], 1), rule)
    splits = blocks.splits(programs * heads, tile.warps, loop)
    dq = q.new_empty(q.shape)
    dq_parts = _parts(dq, splits)
    kernels.d_queries_kernel[programs, heads, splits](
        q, k, v, table, layout.q_cu, layout.k_cu, layout.k_start, layout.q_position, layout.k_position, seed,
        statistics, delta, d_attended, dq_parts, peak, partial, *numbers, bits, _scale(q, rule), rule.dropout,
        **_shared(inputs, rule),
        TILES=tile.tiles(v.shape[2]), DELTAS=1 if delta is None else delta.shape[0],
        OFFSETS=offsets, COPIES=blocks.TABLE_COPIES, SPAN=tile.diagonals, SPLIT=splits > 1,
        ONCE=tile.once,
        **_tile(tile),
    )  # fmt: skip
    _add(dq_parts, dq)
    if table is None or partial is None:
        return dq, None
    d_table = torch.empty_like(table)
    if rule.bias == "local":
        kernels.local_table_kernel[(-(-numbers[5] // 32),)](
            partial, d_table, programs * heads, numbers[3], numbers[5],
            OFFSETS=offsets, BM=tile.queries, BN=tile.keys, SPAN=tile.diagonals, ROWS=64, BLOCK=32, num_warps=8,
        )  # fmt: skip
    else:
        kernels.original_table_kernel[(-(-numbers[5] // 128),)](
            partial, peak, d_table, numbers[5], bits, COPIES=blocks.TABLE_COPIES, BLOCK=128
        )
    return dq, d_table


class _WindowAttention(torch.autograd.Function):
    """The two operators, tied together."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        table: Tensor | None,
        q_cu: Tensor,
        k_cu: Tensor | None,
        k_start: Tensor | None,
        q_position: Tensor | None,
        k_position: Tensor | None,
        seed: Tensor | None,
        rule: Rule,
    ) -> Tensor:
        tensors = (q, k, v, gate, table, q_cu, k_cu, k_start, q_position, k_position, seed)
        out, statistics, attended = forward(*tensors, *_flat(rule), any(ctx.needs_input_grad))
        kept = attended if gate is not None else out if rule.activation == "softmax" else None
        ctx.save_for_backward(*tensors, statistics, kept)
        ctx.rule = rule
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dq, dk, dv, d_gate, d_table = backward(grads[0], *saved, *_flat(ctx.rule))
        gate, table = saved[3], saved[4]
        return dq, dk, dv, None if gate is None else d_gate, None if table is None else d_table, *((None,) * 7)


def _flat(rule: Rule) -> tuple[Any, ...]:
    """The options of the operators."""
    return rule.causal, rule.window or 0, rule.chunk or 0, rule.activation, rule.bias, rule.dropout


def window_attention(inputs: Inputs, layout: Layout, rule: Rule) -> Tensor:
    """See :func:`sma_modules.ops.window_attention.window_attention`."""
    q, k, v, gate, table = inputs
    original = rule.bias == "original"
    out: Tensor = _WindowAttention.apply(  # type: ignore[no-untyped-call]
        q,
        k,
        v,
        gate,
        None if table is None or rule.bias == "none" else table.float(),
        layout.q_cu,
        None if layout.aligned else layout.k_cu,
        layout.k_start,
        layout.q_position if original else None,
        layout.k_position if original and layout.k_position is not layout.q_position else None,
        draw_seed(q.device) if rule.dropout > 0 else None,
        rule,
    )
    return out
