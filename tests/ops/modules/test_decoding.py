"""The steps of decoding: every backend is the definition, and the definition is that of whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import BackendError, ConfigError, ShapeError, StreamingError
from sma.ops import using
from sma.ops.kernel import why_not_triton
from sma.ops.row_norm import RowNorm
from sma.steppers import SlotSpec
from sma.working_memory import WorkingMemory
from sma_modules.ops.ema import EMAState, ema
from sma_modules.ops.ema_step import OP as EMA_STEP
from sma_modules.ops.ema_step import Averages, Coefficients, ema_step
from sma_modules.ops.ring_attention import OP as RING_ATTENTION
from sma_modules.ops.ring_attention import Ring, ring_attention
from sma_modules.ops.window_attention import window_attention
from tests.kernels import Compilation, compile_all
from tests.ops.modules.kernel_checks import guarded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = why_not_triton(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(
    HERE is not None and "forced" not in HERE, reason="neither a GPU nor Triton's interpreter"
)
BACKENDS = ["eager", pytest.param("triton", marks=needs_triton)]
SLOTS, D = 3, 5


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def flags(rate: float, seed: int) -> Tensor:
    return (torch.rand(SLOTS, generator=torch.Generator().manual_seed(seed)) < rate).to(DEVICE)


def copied(memory: Any) -> Any:
    return replace(memory, **{name: deepcopy(value) for name, value in vars(memory).items()})


def same(one: Any, other: Any, tolerance: float) -> None:
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def parameters(dim: int, n_state: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(numbers(dim, n_state, seed=seed, dtype=dtype) for seed in range(4))


@pytest.mark.parametrize("rollback", [0, 2])
@pytest.mark.parametrize("truncation", [None, 1, 4])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_average_is_that_of_the_whole_sequence(backend: str, truncation: int | None, rollback: int) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    x = numbers(SLOTS, 14, D, seed=9, dtype=dtype)
    delta, alpha, beta, gamma = parameters(D, 3, dtype)
    omega = numbers(D, seed=5, dtype=dtype)
    expected, _ = ema(
        x.double(), *(p.double()[..., None] for p in (delta, alpha, beta)), gamma.double(), omega.double(),
        bidirectional=False, truncation=truncation,
    )  # fmt: skip
    coefficients = Coefficients.of((delta, alpha, beta, gamma), omega, truncation)
    averages = Averages.empty(SlotSpec(SLOTS, rollback, x), D, 3, truncation)
    position = torch.tensor([0, 5, 11], device=DEVICE)  # where a stream begins does not matter
    live = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    with using(backend):
        for t in range(14):
            y = ema_step(x[:, t], averages, coefficients, live=live, position=position)
            torch.testing.assert_close(y.double(), expected[:, t], rtol=0, atol=1e-10 if dtype.itemsize == 8 else 2e-5)
            position = position + 1


NORMS: dict[str, Callable[[int], RowNorm | None]] = {
    "none": lambda width: None,
    "layer": lambda width: RowNorm(True, 1e-5, numbers(width, seed=7), numbers(width, seed=8)),
    "bare": lambda width: RowNorm(True, 1e-5, None, None),
    "rms": lambda width: RowNorm(False, 1e-5, numbers(width, seed=7), None),
    "scale": lambda width: RowNorm(False, 1e-5, numbers(1, seed=7), None),
}


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("truncation", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_average_equals_the_reference(backend: str, truncation: int | None, norm: str, activation: Any) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    dim = 37
    own = NORMS[norm](dim)
    own = own and own._replace(
        **{part: None if getattr(own, part) is None else getattr(own, part).to(dtype) for part in ("weight", "bias")}
    )
    coefficients = Coefficients.of(parameters(dim, 3, dtype)[:4], numbers(dim, seed=5, dtype=dtype), truncation)  # type: ignore[arg-type]
    one = Averages.empty(SlotSpec(SLOTS, 1, torch.zeros(0, dtype=dtype, device=DEVICE)), dim, 3, truncation)
    other = copied(one)
    position = torch.tensor([0, 3, 8], device=DEVICE)
    for t in range(9):
        x, live = numbers(SLOTS, dim, seed=t, dtype=dtype), flags(0.7, t)
        options: dict[str, Any] = {"live": live, "position": position, "norm": own, "activation": activation}
        with using(backend):
            y = ema_step(x, one, coefficients, **options)
        with using("reference"):
            expected = ema_step(x, other, coefficients, **options)
        torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
        same(one, other, tolerance)
        position = position + live


def test_states_of_averages_come_and_go() -> None:
    averages = Averages.empty(SlotSpec(4, 2, torch.zeros(0, dtype=torch.float64, device=DEVICE)), D, 3, 6)
    count, slots, position = (torch.tensor(each, device=DEVICE) for each in ([2, 5], [3, 1], [17, 4]))
    state = EMAState(numbers(2, D, 3), numbers(2, D, 3, seed=1), count, numbers(2, 6, D, seed=2))
    averages.write(slots, state, position)
    for tensor, back in zip(state.tensors(), averages.read(slots, position).tensors(), strict=True):
        assert torch.equal(tensor, back)
    with pytest.raises(StreamingError, match=r"rows of state.history must be \(6, 5\), got None"):
        averages.write(slots, EMAState(state.hidden, state.fresh), position)


RULES: dict[str, dict[str, Any]] = {
    "softmax": {"window": 4},
    "wide": {"window": 70},
    "chunk": {"window": None, "chunk": 5},
    "both": {"window": 3, "chunk": 4},
    "relu2": {"window": 4, "activation": "relu2"},
    "relu2 in chunks": {"window": None, "chunk": 4, "activation": "relu2"},
    "laplace": {"window": 70, "activation": "laplace"},
    "original": {"window": 4, "bias": "original"},
    "original, wide": {"window": 66, "bias": "original"},
    "local": {"window": 4, "bias": "local"},
}


def ring_of(rule: dict[str, Any], heads: int, width: int, dtype: torch.dtype, rollback: int = 1) -> Ring:
    bounds = [rule.get("window"), rule.get("chunk") and rule["chunk"] - 1]
    reach = min(bound for bound in bounds if bound is not None)
    return Ring.empty(SlotSpec(SLOTS, rollback, torch.zeros(0, dtype=dtype, device=DEVICE)), reach, heads, 3, width)


def table_of(rule: dict[str, Any], dtype: torch.dtype) -> Tensor | None:
    entries = {"original": 2 * 6 - 1, "local": 6 * (rule["window"] or 0) - 1}.get(rule.get("bias", "none"))
    return None if entries is None else numbers(entries, seed=3, dtype=dtype)


@pytest.mark.parametrize("rule", RULES)
def test_attention_is_that_of_the_whole_sequence(rule: str) -> None:
    options, length = RULES[rule], 11
    ring = ring_of(options, 1, 6, torch.float64)
    table = table_of(options, torch.float64)
    q, k, v = (numbers(SLOTS, length, 1, width, seed=seed) for seed, width in enumerate((3, 3, 6)))
    cu = torch.arange(SLOTS + 1, device=DEVICE) * length
    at = torch.arange(length, device=DEVICE) * 2
    expected = window_attention(
        *(x.flatten(0, 1) for x in (q, k, v)), q_cu=cu, k_cu=cu, max_q=length, max_k=length, causal=True,
        bias_table=table, q_position=at.repeat(SLOTS), k_position=at.repeat(SLOTS), **options,
    ).view(SLOTS, length, 1, 6)  # fmt: skip
    all_of_them = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    for t in range(length):
        out = ring_attention(
            q[:, t], k[:, t], v[:, t], ring, active=all_of_them, live=all_of_them, bias_table=table,
            position=torch.full((SLOTS,), t, device=DEVICE), at=at[t].expand(SLOTS), **options,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[:, t], rtol=0, atol=1e-10)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_equals_the_reference(backend: str, rule: str, heads: tuple[int, int]) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    one = ring_of(RULES[rule], heads[1], 6, dtype)
    other = copied(one)
    table = table_of(RULES[rule], dtype)
    position = torch.tensor([0, 3, 8], device=DEVICE)
    for t in range(12 if (RULES[rule]["window"] or 0) < 60 else 6):
        live = flags(0.8, t)
        q, k, v, gate = (
            numbers(SLOTS, n, width, seed=10 * t + seed, dtype=dtype)
            for seed, (n, width) in enumerate(((heads[0], 3), (heads[1], 3), (heads[1], 6), (heads[0], 6)))
        )
        options: dict[str, Any] = {
            **RULES[rule], "active": live & flags(0.7, t + 50), "live": live, "position": position,
            "at": position * 2, "bias_table": table, "gate": gate if t % 2 else None,
        }  # fmt: skip
        with using(backend):
            out = ring_attention(q, k, v, one, **options)
        with using("reference"):
            expected = ring_attention(q, k, v, other, **options)
        torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
        same(one, other, 0)
        position = position + live


@needs_triton
def test_a_ring_that_went_round_many_times() -> None:
    """More spans than one, all of them full, with a fresh memory written in between."""
    rule = {"window": 130}
    one = ring_of(rule, 1, 300, torch.float32)
    memory = WorkingMemory(
        (
            numbers(SLOTS, 130, 1, 3, dtype=torch.float32),
            numbers(SLOTS, 130, 1, 300, seed=1, dtype=torch.float32),
            torch.arange(130, device=DEVICE).repeat(SLOTS, 1),
        ),
        torch.tensor([1000, 131, 40], device=DEVICE),
    )
    slots, position = torch.arange(SLOTS, device=DEVICE), torch.tensor([4000, 131, 77], device=DEVICE)
    memory = replace(
        memory,
        rows=tuple(
            row.masked_fill((torch.arange(130, device=DEVICE) < 90).view(1, -1, *(1,) * (row.dim() - 2)), 0).where(
                torch.tensor([False, False, True], device=DEVICE).view(-1, *(1,) * (row.dim() - 1)), row
            )
            for row in memory.rows
        ),
    )
    one.write(slots, memory, position)
    for tensor, back in zip(memory.tensors(), one.read(slots, position).tensors(), strict=True):
        assert torch.equal(tensor, back)
    other = copied(one)
    live = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    for t in range(3):
        q, k, v = (numbers(SLOTS, 1, width, seed=3 * t + i, dtype=torch.float32) for i, width in enumerate((3, 3, 300)))
        outs = []
        for backend, ring in (("triton", one), ("reference", other)):
            with using(backend):
                outs.append(ring_attention(q, k, v, ring, active=live, live=live, position=position + t, **rule))
        torch.testing.assert_close(*outs, rtol=0, atol=1e-5)
        same(one, other, 0)


@needs_triton
@pytest.mark.parametrize("rule", ["softmax", "wide"])
def test_attention_writes_nowhere_else(rule: str) -> None:
    ring = ring_of(RULES[rule], 1, 6, torch.float32)
    q, k, v = (numbers(SLOTS, 1, width, seed=i, dtype=torch.float32) for i, width in enumerate((3, 3, 6)))
    active = torch.tensor([True, False, True], device=DEVICE)
    position = torch.zeros(SLOTS, dtype=torch.int64, device=DEVICE)
    with guarded(), using("triton"):
        out = ring_attention(q, k, v, ring, active=active, live=active, position=position, **RULES[rule])
    torch.testing.assert_close(out, v.masked_fill(~active[:, None, None], 0))


@needs_triton
def test_low_precision_is_rounded_once() -> None:
    half = torch.float16
    q, k, v, gate = (numbers(SLOTS, 1, width, seed=i).to(half) for i, width in enumerate((3, 3, 6, 6)))
    live = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    ring = ring_of(RULES["softmax"], 1, 6, half)
    wide = ring_of(RULES["softmax"], 1, 6, torch.float64)
    for t in range(6):
        position = torch.full((SLOTS,), t, device=DEVICE)
        options: dict[str, Any] = {"active": live, "live": live, "position": position, "window": 4}
        with using("triton"):
            out = ring_attention(q + t, k - t, v * t, ring, gate=gate, **options)
        with using("reference"):
            exact = ring_attention(*((x.double()) for x in (q + t, k - t, v * t)), wide, gate=gate.double(), **options)
        assert out.dtype == half
        assert float((out.double() - exact).abs().max()) <= 1e-3 * max(1.0, float(exact.abs().max()))
    with using("triton"):
        averages = Averages.empty(SlotSpec(SLOTS, 0, q), D, 3, None)
        assert averages.hidden.dtype == torch.float32
        coefficients = Coefficients.of(tuple(p.to(half) for p in parameters(D, 3)), numbers(D).to(half), None)  # type: ignore[arg-type]
        y = ema_step(numbers(SLOTS, D).to(half), averages, coefficients, live=live, position=position)
        assert y.dtype == half


def test_bad_input_is_refused() -> None:
    ring = ring_of(RULES["softmax"], 2, 6, torch.float64)
    live = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    options: dict[str, Any] = {"active": live, "live": live, "position": live.long(), "window": 4}
    q, k, v = (numbers(SLOTS, 2, width) for width in (3, 3, 6))
    with pytest.raises(ShapeError, match=r"must agree with a ring of \(3, 6, 2, 3\) and \(3, 6, 2, 6\)"):
        ring_attention(q, k[:, :1], v[:, :1], ring, **options)
    with pytest.raises(ConfigError, match="the ring holds 4 tokens, got window 5 and chunk None"):
        ring_attention(q, k, v, ring, **{**options, "window": 5})
    with pytest.raises(ConfigError, match="got window None and chunk None"):
        ring_attention(q, k, v, ring, **{**options, "window": None})
    with pytest.raises(ConfigError, match="bias_table goes with bias 'original' or 'local' only, got bias 'local'"):
        ring_attention(q, k, v, ring, bias="local", **options)
    with pytest.raises(ShapeError, match="the ring has 3 slots, there are 2 tokens"):
        ring_attention(q[:2], k[:2], v[:2], ring, **{name: each[:2] if name != "window" else 4 for name, each in options.items()})  # fmt: skip # noqa: E501
    averages = Averages.empty(SlotSpec(SLOTS, 0, q), D, 3, None)
    coefficients = Coefficients.of(parameters(D, 3), numbers(D), None)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"ema_step: x \(S, D\), averages .* must agree, got \(3, 4\)"):
        ema_step(numbers(SLOTS, 4), averages, coefficients, live=live, position=live.long())
    with pytest.raises(StreamingError, match="needs a WorkingMemory of rows"):
        ring.write(live.nonzero().squeeze(1), WorkingMemory.empty(SLOTS, 4, q[:0]), live.long())


@needs_triton
def test_what_the_kernels_cannot_do_has_a_reason() -> None:
    live = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    wide = Ring.empty(SlotSpec(SLOTS, 0, torch.zeros(0, device=DEVICE)), 4, 1, 300, 2)
    q, v = torch.zeros(SLOTS, 1, 300, device=DEVICE), torch.zeros(SLOTS, 1, 2, device=DEVICE)
    with using("triton"), pytest.raises(BackendError, match="keys of at most 256 features, got 300"):
        ring_attention(q, q, v, wide, active=live, live=live, position=live.long(), window=4)
    assert set(RING_ATTENTION.backends) == set(EMA_STEP.backends) == {"triton", "eager", "reference"}


def test_fits_an_h100() -> None:
    """No register spills to memory, at the sizes of the language models."""
    asked = []
    kernels = "sma_modules.ops.{}.triton_kernel"
    for kind in ("*bf16", "*fp32"):
        for dim, taps, rows in ((616, 0, 0), (616, 2048, 2048), (1024, 0, 0)):
            wide = dict.fromkeys(("hidden", "fresh", "loss", "drive", "read", "leaving", "omega"), "*fp32")
            signature = {
                "x": kind, "history": kind, **wide, "count": "*i64", "norm_weight": kind, "norm_bias": kind,
                "live": "*i1", "position": "*i64", "out": kind, "slots": "i32", "eps": "fp32",
            }  # fmt: skip
            constants = {
                "D": dim, "N": 16, "VERSIONS": 1, "TAPS": taps, "ROWS": rows, "NORM": True, "CENTRED": True,
                "WEIGHT_STRIDE": 1, "HAS_BIAS": True, "SILU": True, "WIDTH": 1024, "BD": 32, "BN": 16,
            }  # fmt: skip
            asked.append(Compilation(kernels.format("ema_step"), "step_kernel", signature, constants, {"num_warps": 4}))
        for z, f, window in ((128, 1232, 1024), (64, 256, 128), (256, 256, 512)):
            floats = dict.fromkeys(("q", "k", "v", "gate", "table", "keys", "values", "out"), kind)
            integers = dict.fromkeys(("positions", "counts", "position", "where"), "*i64")
            signature = {
                **floats, **integers, "active": "*i1", "live": "*i1", "best": "*fp32", "total": "*fp32",
                "partial": "*fp32", "slots": "i32", "scale": "fp32",
            }  # fmt: skip
            spans = -(-(window + 1) // 64)
            shared = {
                "H": 1, "F": f, "VERSIONS": 2, "WINDOW": window, "CHUNK": 0, "ACTIVATION": 0, "SPANS": spans, "BT": 64,
            }  # fmt: skip
            constants = {
                **shared, "G": 1, "Z": z, "ROWS": window + 1, "BIAS": 1, "LAST": 511, "BZ": z, "BF": 256,
            }  # fmt: skip
            module = kernels.format("ring_attention")
            asked.append(Compilation(module, "span_kernel", signature, constants, {"num_warps": 8}))
            constants = {**shared, "BS": 1 << (spans - 1).bit_length(), "BF": 64}
            asked.append(Compilation(module, "sum_kernel", signature, constants, {"num_warps": 4}))
    for each, needs in zip(asked, compile_all(asked), strict=True):
        assert needs.spilled == 0, each
        assert needs.shared <= 227 * 1024, each
