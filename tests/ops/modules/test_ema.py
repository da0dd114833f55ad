"""The moving average: definition, convolution and recurrence agree, in values and gradients, in every way to run it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sma.errors import ConfigError, ShapeError, StreamingError
from sma.ops import using
from sma_modules.ops.ema import EMAState, ema
from sma_modules.ops.ema.convolution import convolve, fast_size
from tests.devices import DEVICE, needs_triton

BACKENDS = ("reference", "eager")
NAMES = ("delta", "alpha", "beta", "gamma", "omega")
GOLDEN = Path(os.environ.get("SMA_GOLDEN", Path(__file__).resolve().parents[4] / "shared" / "golden"))


def parameters(
    dim: int, n_state: int, bidirectional: bool, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Random parameters of golden shapes, requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * dim if bidirectional else dim
    shapes = [(rows, n_state, 1)] * 3 + [(rows, n_state), (dim,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(backend: str, x: Tensor, weights: list[Tensor], **options: Any) -> tuple[Tensor, EMAState | None]:
    with using(backend):
        return ema(x, *weights, **{"bidirectional": False, **options})


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["causal", "causal_truncated", "bidirectional", "bidirectional_truncated"])
def test_golden(name: str, backend: str) -> None:
    path = GOLDEN / f"ema_{name}.npz"
    if not path.is_file():
        pytest.skip(f"golden file {path} is absent; set SMA_GOLDEN to the folder that holds it")
    with np.load(path) as archive:
        data = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
        meta = json.loads(str(archive["meta"]))
    x = data["x"].requires_grad_()
    weights = [data[f"param.{parameter}"].requires_grad_() for parameter in NAMES]
    lengths = data["valid"].sum(1) if "valid" in data else None
    y, state = run(
        backend,
        x,
        weights,
        bidirectional=meta["bidirectional"],
        truncation=meta["truncation"],
        lengths=lengths,
        return_state=not meta["bidirectional"],
    )
    y.backward(data["grad_y"])
    valid = data.get("valid", torch.ones(x.shape[:2], dtype=torch.bool))
    close(y[valid], data["y"][valid], 1e-9)
    assert x.grad is not None
    close(x.grad, data["grad_x"], 1e-9)
    for parameter, weight in zip(NAMES, weights, strict=True):
        assert weight.grad is not None
        close(weight.grad, data[f"grad.{parameter}"], 1e-9)
    if "state_last" in data:
        assert state is not None
        close(state.hidden, data["state_last"], 1e-9)
        steps, past = [], None
        for t in range(x.shape[1]):
            step, past = run(backend, x[:, t : t + 1], weights, state=past, return_state=True)
            steps.append(step)
        close(torch.cat(steps, 1), data["y_step"], 1e-9)


def test_geometric_response() -> None:
    """A case worked out by hand: p = 1/2, q = 3/4, input weight 2, so an impulse decays as (3/4)^t."""
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    x = torch.tensor([[[1.0], [0.0], [0.0], [0.0]]], dtype=torch.float64)
    for backend in BACKENDS:
        weights = [zero, zero, zero + 2, zero[0] + 1, zero[0, 0] + 10]
        y, _ = run(backend, x, weights)
        close(y.flatten(), torch.tensor([11.0, 0.75, 0.5625, 0.421875], dtype=torch.float64))
        y, _ = run(backend, x, weights, truncation=2)
        close(y.flatten(), torch.tensor([11.0, 0.75, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("lengths", [None, "ragged"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("truncation", [None, 1, 5, 300])
@pytest.mark.parametrize("length", [1, 7, 23])
def test_eager_equals_reference(length: int, truncation: int | None, bidirectional: bool, lengths: str | None) -> None:
    weights = parameters(3, 4, bidirectional)
    x = torch.randn(3, length, 3, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn_like(x)
    options: dict[str, Any] = {"bidirectional": bidirectional, "truncation": truncation}
    if lengths:
        options["lengths"] = torch.tensor([length, 0, length // 2])
    results = []
    for backend in BACKENDS:
        y, _ = run(backend, x, weights, **options)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *weights], grad_y)])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("length", [63, 100, 129, 1000])
def test_long_kernels(length: int) -> None:
    """Against the kernel written out as a table of powers."""
    weights = parameters(4, 3, False)
    x = torch.randn(2, length, 4, dtype=torch.float64)
    p = weights[0].sigmoid()
    powers = (1 - p * weights[1].sigmoid()) ** torch.arange(length, dtype=torch.float64)
    kernel = (weights[3][..., None] * 3**-0.5 * p * weights[2] * powers).sum(1)
    toeplitz = torch.zeros(4, length, length, dtype=torch.float64)
    for t in range(length):
        toeplitz[:, t, : t + 1] = kernel[:, : t + 1].flip(1)
    expected = torch.einsum("dts,bsd->btd", toeplitz, x) + weights[4] * x
    close(run("eager", x, weights)[0], expected, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("length", "truncation"), [(3, None), (10, None), (10, 4)])
def test_gradcheck(backend: str, bidirectional: bool, length: int, truncation: int | None) -> None:
    weights = parameters(2, 2, bidirectional)
    x = torch.randn(2, length, 2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([length, length - 2])

    def function(*inputs: Tensor) -> Tensor:
        options = {"bidirectional": bidirectional, "truncation": truncation, "lengths": lengths}
        return run(backend, inputs[0], list(inputs[1:]), **options)[0]

    assert torch.autograd.gradcheck(function, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_through_state(backend: str) -> None:
    weights = parameters(2, 2, False)
    x = torch.randn(1, 22, 2, dtype=torch.float64, requires_grad=True)

    def function(*inputs: Tensor) -> Tensor:
        options: dict[str, Any] = {"truncation": 5, "return_state": True}
        _, state = run(backend, inputs[0][:, :2], list(inputs[1:]), **options)
        y, state = run(backend, inputs[0][:, 2:], list(inputs[1:]), state=state, **options)
        assert state is not None
        return torch.cat([y.flatten(), state.hidden.flatten()])

    assert torch.autograd.gradcheck(function, (x, *weights), fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_split_streams_alike(data: st.DataObject) -> None:
    """Parallel == chunks == steps; rows end early, pause and resume, and backends take over each other's state."""
    batch = data.draw(st.integers(1, 3), label="batch")
    chunks = data.draw(st.lists(st.integers(0, 24), min_size=1, max_size=6), label="chunks")
    truncation = data.draw(st.sampled_from([None, 1, 2, 4, 9, 30]), label="truncation")
    counts = torch.tensor([[data.draw(st.integers(0, size)) for size in chunks] for _ in range(batch)])
    weights = [weight.detach() for weight in parameters(3, 2, False, seed=data.draw(st.integers(0, 9)))]
    total = counts.sum(1)
    rows = [torch.randn(int(count), 3, dtype=torch.float64) for count in total]

    streamed: list[list[Tensor]] = [[] for _ in rows]
    state, size_at_start = None, None
    for i, size in enumerate(chunks):
        x = torch.full((batch, size, 3), 7.0, dtype=torch.float64)
        for b, row in enumerate(rows):
            first = int(counts[b, :i].sum())
            x[b, : counts[b, i]] = row[first : first + int(counts[b, i])]
        backend = data.draw(st.sampled_from(BACKENDS))
        before = state
        y, state = run(backend, x, weights, truncation=truncation, lengths=counts[:, i], state=state, return_state=True)
        assert state is not None
        size_at_start = size_at_start or state.nbytes
        assert state.nbytes == size_at_start
        for b in range(batch):
            streamed[b].append(y[b, : counts[b, i]])
            if before is not None and counts[b, i] == 0:
                assert torch.equal(before.hidden[b], state.hidden[b])
    for row, parts in zip(rows, streamed, strict=True):
        expected, _ = run("reference", row[None], weights, truncation=truncation)
        close(torch.cat(parts), expected[0])


@pytest.mark.parametrize("truncation", [None, 3, 20])
def test_incoming_state_is_left_alone(truncation: int | None) -> None:
    weights = parameters(2, 3, False)
    x = torch.randn(2, 30, 2, dtype=torch.float64)
    _, state = run("eager", x, weights, truncation=truncation, return_state=True)
    assert state is not None
    copy = state.clone()
    for size in (1, 30):
        run("eager", x[:, :size], weights, truncation=truncation, state=state, return_state=True)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), copy.tensors(), strict=True))


def test_long_truncated_stream_does_not_drift() -> None:
    """float32, a state that forgets within 1e7 tokens, 8 000 steps: the window must not collect rounding errors."""
    truncation, length = 64, 8_000
    weights = [torch.full((1, 1, 1), -8.0), torch.full((1, 1, 1), -8.0), torch.full((1, 1, 1), 3000.0)]
    weights += [torch.ones(1, 1), torch.zeros(1)]
    x = torch.randn(1, length, 1, generator=torch.Generator().manual_seed(0)) + 1
    expected, _ = run("eager", x.double(), [weight.double() for weight in weights], truncation=truncation)
    state, worst = None, 0.0
    for t in range(0, length, 16):  # the longest chunks that run through the recurrence
        y, state = run("eager", x[:, t : t + 16], weights, truncation=truncation, state=state, return_state=True)
        worst = max(worst, float((y - expected[:, t : t + 16]).abs().max()))
    assert worst < 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [4, 200])
def test_low_precision(dtype: torch.dtype, length: int) -> None:
    """At most twice the error of rounding the exact result, which is PyTorch's best in that precision."""
    weights = [weight.detach().to(dtype) for weight in parameters(8, 16, False)]
    x = torch.randn(2, length, 8).to(dtype)
    exact, _ = run("reference", x.double(), [weight.double() for weight in weights])
    for backend in BACKENDS:
        y, state = run(backend, x, weights, return_state=True)
        assert y.dtype == dtype
        assert state is not None
        assert state.hidden.dtype == torch.float32
        error, rounding = (y.double() - exact).abs(), (exact.to(dtype).double() - exact).abs()
        assert error.max() <= 2 * rounding.max()
        assert error.mean() <= 2 * rounding.mean()


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_are_kept_in_their_own_dtype(dtype: torch.dtype, backend: str) -> None:
    """Half the bytes, and the same numbers as if they had been kept in float32."""
    weights = [each.detach().float().to(DEVICE) for each in parameters(3, 2, False)]
    x = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    state = wide = None
    for chunk in x.split([9, 1, 20], 1):
        y, state = run(backend, chunk, weights, truncation=5, state=state, return_state=True)
        expected, wide = run(backend, chunk, weights, truncation=5, state=wide, return_state=True)
        assert torch.equal(y, expected)
        assert isinstance(state, EMAState)
        assert isinstance(wide, EMAState)
        assert (state.hidden.dtype, state.history.dtype) == (torch.float32, dtype)  # type: ignore[union-attr]
        wide = replace(wide, history=wide.history.float())  # type: ignore[union-attr]
    assert torch.equal(state.history, x[:, -5:])  # type: ignore[union-attr, arg-type]
    if backend == "triton":
        return  # the kernels read what is kept in the dtype of the chunk
    # What came in a wider dtype is not rounded because something narrower comes after it.
    _, state = run(backend, x.float() + 1e-4, weights, truncation=5, return_state=True)
    _, state = run(backend, x[:, :1], weights, truncation=5, state=state, return_state=True)
    assert state is not None
    assert torch.equal(state.history[:, :4], x[:, -4:].float() + 1e-4)  # type: ignore[index]


def test_float32_error_of_the_convolution() -> None:
    weights = [weight.detach() for weight in parameters(8, 16, True)]
    x = torch.randn(2, 700, 8, dtype=torch.float64)
    exact, _ = run("eager", x, weights, bidirectional=True)
    y, _ = run("eager", x.float(), [weight.float() for weight in weights], bidirectional=True)
    assert float((y - exact).abs().max()) < 3e-6 * float(exact.abs().max())


def test_autocast_keeps_full_precision() -> None:
    weights = parameters(4, 4, False, torch.float32)
    x = torch.randn(2, 50, 4, requires_grad=True)
    plain = torch.autograd.grad(run("eager", x, weights)[0].square().sum(), [x, *weights])
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = run("eager", x, weights)
    assert y.dtype == torch.float32
    for actual, expected in zip(torch.autograd.grad(y.square().sum(), [x, *weights]), plain, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("extreme", [-200.0, -20.0, 20.0, 200.0])
@pytest.mark.parametrize("length", [3, 40])
def test_saturated_parameters_stay_finite(extreme: float, length: int) -> None:
    """Forgetting everything at once (q = 0) and nothing ever (q = 1) are both legal."""
    weights = parameters(2, 3, False, torch.float32)
    with torch.no_grad():
        weights[0].fill_(extreme)
        weights[1].fill_(extreme)
    x = torch.randn(2, length, 2, requires_grad=True)
    expected, _ = run("reference", x.double(), [weight.double() for weight in weights])
    y, state = run("eager", x, weights, return_state=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert state is not None
    assert state.hidden.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), [x, *weights]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_another_world(backend: str, bidirectional: bool) -> None:
    """Whatever lies at padding, also nan, real tokens and the state do not see it."""
    weights = parameters(3, 2, bidirectional)
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    lengths = torch.tensor([12, 5])
    poisoned = x.clone()
    poisoned[1, 5:] = torch.nan
    options = {"bidirectional": bidirectional, "lengths": lengths, "return_state": not bidirectional}
    y, state = run(backend, poisoned, weights, **options)
    alone, state_alone = run(backend, x[1:, :5], weights, bidirectional=bidirectional, return_state=not bidirectional)
    close(y[1:, :5], alone)
    if state is not None and state_alone is not None:
        close(state.hidden[1:], state_alone.hidden)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3)])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("truncation", [None, 4])
def test_no_tokens(shape: tuple[int, int, int], bidirectional: bool, truncation: int | None) -> None:
    weights = parameters(3, 2, bidirectional)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, state = run(
        "eager", x, weights, bidirectional=bidirectional, truncation=truncation, return_state=not bidirectional
    )
    assert y.shape == shape
    assert (state is None) == bidirectional
    y.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in weights)


def test_deterministic() -> None:
    weights = parameters(16, 4, True, torch.float32)
    x = torch.randn(4, 90, 16, requires_grad=True)
    first, second = (
        torch.autograd.grad(run("eager", x, weights, bidirectional=True)[0].sum(), [x, *weights]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_convolution_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are cut into blocks on a CPU; the cut changes nothing."""
    x, kernel = torch.randn(2, 30, 40, requires_grad=True), torch.randn(40, 30, requires_grad=True)
    whole = convolve(x, kernel)
    grads = torch.autograd.grad(whole.square().sum(), [x, kernel])
    monkeypatch.setattr("sma_modules.ops.ema.convolution.BLOCK_ELEMENTS", 1)
    blocked = convolve(x, kernel)
    torch.testing.assert_close(blocked, whole)
    torch.testing.assert_close(torch.autograd.grad(blocked.square().sum(), [x, kernel]), grads)


def test_fast_sizes() -> None:
    smooth = sorted(2**a * 3**b * 5**c for a in range(1, 15) for b in range(9) for c in range(6))
    for minimum in (1, 2, 3, 7, 63, 100, 129, 1023, 1025, 4097, 9215):
        assert fast_size(minimum) == next(size for size in smooth if size >= minimum)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ShapeError, r"x must be floating point \(B, L, D\)"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int64)}, ShapeError, "int64"),
        ({"x": torch.zeros(2, 3, 5)}, ShapeError, r"delta must be \(5, 2, 1\)"),
        ({"gamma": torch.zeros(8, 2)}, ShapeError, r"gamma must be \(4, 2\) for a causal"),
        ({"truncation": 0}, ConfigError, "truncation must be None or at least 1, got 0"),
        ({"lengths": torch.tensor([3.0, 1.0])}, ShapeError, "lengths must be 2 integers"),
        ({"lengths": torch.tensor([3])}, ShapeError, "lengths must be 2 integers"),
        ({"lengths": torch.tensor([4, 1])}, ShapeError, r"lengths must lie in 0\.\.3, got \[4, 1\]"),
        ({"lengths": torch.tensor([-1, 1])}, ShapeError, "lengths must lie in"),
        ({"state": EMAState(torch.zeros(3, 4, 2))}, StreamingError, r"state.hidden must be \(\(2, 4, 2\)"),
        ({"state": EMAState(torch.zeros(2, 4, 2)), "truncation": 3}, StreamingError, "state.fresh must be"),
        ({"state": EMAState(torch.zeros(2, 4, 2).double())}, StreamingError, "float64"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    weights = dict(zip(NAMES, parameters(4, 2, False, torch.float32), strict=True))
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 4), **weights, "bidirectional": False, **change}
    with pytest.raises(error, match=message):
        ema(**arguments)


def test_bidirectional_has_no_state() -> None:
    weights = parameters(4, 2, True, torch.float32)
    x = torch.zeros(2, 3, 4)
    with pytest.raises(StreamingError, match="bidirectional"):
        ema(x, *weights, bidirectional=True, return_state=True)
    with pytest.raises(StreamingError, match="bidirectional"):
        ema(x, *weights, bidirectional=True, state=EMAState(torch.zeros(2, 4, 2)))
