"""The moving average in Triton: on a GPU where there is one, else in Triton's interpreter (tiny sizes, it is slow)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import BackendError, ConfigError
from sma.ops import using
from sma_modules.mixers.ema import EMA
from sma_modules.ops.ema import EMAState, ema
from tests.kernels import Compilation, compile_all
from tests.ops.modules.kernel_checks import guarded

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter rounds to bfloat16 towards zero, which doubles the error: there float16 stands for both.
LOW = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float16,)
TINY = 16
"""Tokens of a chunk here, so that short sequences have several."""


@pytest.fixture(autouse=True)
def _tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sma_modules.ops.ema import sizes

    monkeypatch.setattr(sizes, "CHUNK", TINY)
    monkeypatch.setattr(sizes, "MINIMUM_CHUNK", TINY)


def parameters(dim: int, n_state: int, bidirectional: bool) -> list[Tensor]:
    """In float64."""
    rows = 2 * dim if bidirectional else dim
    shapes = [(rows, n_state, 1)] * 3 + [(rows, n_state), (dim,)]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [weight.to(DEVICE) for weight in weights]


def evaluate(
    backend: str, dtype: torch.dtype, x: Tensor, weights: list[Tensor], grad_y: Tensor, **options: Any
) -> list[Tensor]:
    """Output and the gradients by x and by every parameter."""
    inputs = [value.to(dtype).requires_grad_() for value in (x, *weights)]
    with using(backend):
        y, _ = ema(inputs[0], *inputs[1:], **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y.to(dtype))]


def check(dtype: torch.dtype, floor: float, x: Tensor, weights: list[Tensor], **options: Any) -> None:
    """At most twice eager's error in the same precision, largest and mean.

    ``floor`` is relative to the largest value: rounding itself, where eager happens to hit the exact result.
    """
    x, weights = x.to(dtype).double(), [weight.to(dtype).double() for weight in weights]
    grad_y = torch.randn_like(x).to(dtype).double()
    exact = evaluate("eager", torch.float64, x, weights, grad_y, **options)
    eager = evaluate("eager", dtype, x, weights, grad_y, **options)
    kernel = evaluate("triton", dtype, x, weights, grad_y, **options)
    scale = float(max(value.abs().max() for value in exact[2:]))
    names = ("y", "x", "delta", "alpha", "beta", "gamma", "omega")
    for name, want, plain, got in zip(names, exact, eager, kernel, strict=True):
        assert got.dtype == dtype
        # A parameter whose gradient vanishes exactly is held to the size of the others'.
        size = float(want.abs().max()) if name in ("y", "x") else scale
        allowed, error = (plain.double() - want).abs(), (got.double() - want).abs()
        assert float(error.max()) <= 2 * float(allowed.max()) + floor * size, name
        assert float(error.mean()) <= 2 * float(allowed.mean()) + floor * size, name


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("truncation", [None, 1, 5, 20, 1000])
@pytest.mark.parametrize(("length", "lengths"), [(1, None), (50, None), (35, (35, 0, 17))])
def test_equals_the_definition(
    length: int, lengths: tuple[int, ...] | None, truncation: int | None, bidirectional: bool
) -> None:
    """One channel forgets in some 10^4 tokens, the others in a few."""
    weights = parameters(3, 4, bidirectional)
    weights[1][::3] -= 9
    batch = len(lengths) if lengths else 2
    x = torch.randn(batch, length, 3, dtype=torch.float64, device=DEVICE)
    check(
        torch.float32,
        2e-6,
        x,
        weights,
        bidirectional=bidirectional,
        truncation=truncation,
        lengths=None if lengths is None else torch.tensor(lengths, device=DEVICE),
        activation="silu" if lengths else "none",
    )


@pytest.mark.parametrize("bidirectional", [False, True])
def test_window_longer_than_the_memory(bidirectional: bool) -> None:
    """Nothing is left of a token when it leaves the window: the kernel takes a shorter way."""
    weights = parameters(3, 4, bidirectional)
    weights[0].clamp_(min=3.0)
    weights[1].clamp_(min=3.0)
    x = torch.randn(1, 50, 3, dtype=torch.float64, device=DEVICE)
    check(torch.float32, 2e-6, x, weights, bidirectional=bidirectional, truncation=20)


@pytest.mark.parametrize("length", [63, 100, 129])
def test_lengths_around_powers_of_two(length: int) -> None:
    x = torch.randn(1, length, 2, dtype=torch.float64, device=DEVICE)
    check(torch.float32, 2e-6, x, parameters(2, 3, True), bidirectional=True, truncation=40)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("truncation", [None, 24])
def test_low_precision(dtype: torch.dtype, activation: str, truncation: int | None) -> None:
    floor = torch.finfo(dtype).eps / 8
    x = torch.randn(2, 40, 8, dtype=torch.float64, device=DEVICE)
    weights = parameters(8, 8, True)
    check(dtype, floor, x, weights, bidirectional=True, truncation=truncation, activation=activation)


@pytest.mark.parametrize("extreme", [-200.0, -20.0, 20.0, 200.0])
@pytest.mark.parametrize("truncation", [None, 20])
def test_saturated_parameters(extreme: float, truncation: int | None) -> None:
    """Forgetting everything at once (q = 0) and nothing ever (q = 1)."""
    weights = parameters(3, 3, False)
    weights[0].fill_(extreme)
    weights[1].fill_(extreme)
    x = torch.randn(2, 40, 3, dtype=torch.float64, device=DEVICE)
    check(torch.float32, 2e-6, x, weights, bidirectional=False, truncation=truncation)


def test_slow_states_over_many_chunks() -> None:
    """A memory of about a million tokens: rounding of q must not act in one direction at every token."""
    weights = parameters(2, 2, False)
    weights[0].fill_(-7.0)
    weights[1].fill_(-7.0)
    x = torch.randn(1, 300, 2, dtype=torch.float64, device=DEVICE) + 1
    check(torch.float32, 5e-7, x, weights, bidirectional=False)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("truncation", [None, 20])
def test_padding_is_another_world(bidirectional: bool, truncation: int | None) -> None:
    """Padding of nan reaches neither real outputs nor, without a gradient there, any gradient."""
    weights = [weight.float().requires_grad_() for weight in parameters(3, 2, bidirectional)]
    clean = torch.randn(2, 24, 3, device=DEVICE)
    lengths = torch.tensor([24, 19], device=DEVICE)
    clean[1, 19:] = 0
    poisoned = clean.clone()
    poisoned[1, 19:] = torch.nan
    results = []
    for x in (clean.requires_grad_(), poisoned.requires_grad_()):
        with using("triton"):
            y, _ = ema(
                x, *weights, bidirectional=bidirectional, truncation=truncation, lengths=lengths, activation="silu"
            )
        real = torch.cat([y[0], y[1, :19]])
        gradients = torch.autograd.grad(real.square().sum(), [x, *weights])
        results.append([real.detach(), torch.cat([gradients[0][0], gradients[0][1, :19]]), *gradients[1:]])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("splits", [(1, 1, 30, 16, 2), (50,), (0, 16, 34)])
def test_streams_in_any_split(splits: tuple[int, ...]) -> None:
    """The state passes between this backend and the others; rows may end early and come to nothing."""
    weights = [weight.float() for weight in parameters(3, 4, False)]
    x = torch.randn(2, 50, 3, device=DEVICE)
    lengths = torch.tensor([50, 23], device=DEVICE)
    options: dict[str, Any] = {"bidirectional": False, "return_state": True}
    with using("eager"):
        exact, last = ema(x.double(), *[w.double() for w in weights], lengths=lengths, **options)
    parts: list[Tensor] = []
    state: EMAState | None = None
    done = 0
    for i, size in enumerate(splits):
        with using("triton" if i % 3 != 1 else "eager"):
            y, state = ema(
                x[:, done : done + size], *weights, state=state, lengths=(lengths - done).clamp(0, size), **options
            )
        parts.append(y)
        done += size
    assert state is not None
    assert last is not None
    y = torch.cat(parts, 1)
    torch.testing.assert_close(y[0].double(), exact[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(y[1, :23].double(), exact[1, :23], rtol=0, atol=5e-6)
    torch.testing.assert_close(state.hidden.double(), last.hidden, rtol=0, atol=5e-6)


@pytest.mark.parametrize("truncation", [1, 5, 20, 50])
def test_a_truncated_stream(truncation: int) -> None:
    """Chunks longer and shorter than the window, rows that end and rows without a token."""
    weights = parameters(2, 3, False)
    narrow = [weight.float() for weight in weights]
    x = torch.randn(3, 70, 2, dtype=torch.float64, device=DEVICE)
    counts = [(25, 3, 0), (20, 0, 0), (25, 30, 20)]
    columns: list[list[Tensor]] = [[], [], []]
    state, at = None, [0, 0, 0]
    for count in counts:
        chunk = torch.full((3, max(count), 2), 100.0, dtype=torch.float64, device=DEVICE)
        for row, taken in enumerate(count):
            chunk[row, :taken] = x[row, at[row] : at[row] + taken]
            at[row] += taken
        with using("triton"):
            y, state = ema(
                chunk.float(), *narrow, bidirectional=False, truncation=truncation, state=state, return_state=True,
                lengths=torch.tensor(count, device=DEVICE),
                activation="silu",
            )  # fmt: skip
        for row, taken in enumerate(count):
            columns[row].append(y[row, :taken])
    assert state is not None
    for row, end in enumerate(at):
        exact, last = ema(
            x[row : row + 1, :end], *weights, bidirectional=False, truncation=truncation, return_state=True,
            activation="silu",
        )  # fmt: skip
        torch.testing.assert_close(torch.cat(columns[row]).double(), exact[0], rtol=0, atol=5e-6)
        assert last is not None
        assert last.history is not None
        assert state.history is not None
        torch.testing.assert_close(state.hidden[row].double(), last.hidden[0], rtol=0, atol=5e-6)
        torch.testing.assert_close(state.history[row].double(), last.history[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("lengths", [None, (20, 0, 7)])
@pytest.mark.parametrize("begun", [False, True])
def test_the_state_after_a_chunk(begun: bool, lengths: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    """At most twice eager's error; inputs are kept as they are, and so is what a row had that takes nothing."""
    weights = [weight.to(dtype).double() for weight in parameters(35, 3, False)]
    x = torch.randn(3, 25, 35, device=DEVICE).to(dtype).double()
    real = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    options: dict[str, Any] = {"bidirectional": False, "truncation": 19, "return_state": True}
    with using("eager"):
        before = ema(x[:, :5], *weights, **options)[1] if begun else None
    found = []
    for backend, kind in (("eager", torch.float64), ("eager", dtype), ("triton", dtype)):
        state = None
        if before is not None and before.history is not None:
            state = before.to(dtype=torch.promote_types(kind, torch.float32))
            state = replace(state, history=before.history.to(kind))
        given = [each.to(kind) for each in (x[:, 5:], *weights)]
        with using(backend), guarded() if backend == "triton" else nullcontext():
            _, after = ema(given[0], *given[1:], state=state, lengths=real, **options)
        assert isinstance(after, EMAState)
        found.append(after)
    exact, eager, mine = found
    for name in ("fresh", "count", "history"):
        assert torch.equal(getattr(mine, name), getattr(eager, name)), name
        assert getattr(mine, name).dtype == getattr(eager, name).dtype, name
    allowed, error = ((each.hidden.double() - exact.hidden).abs() for each in (eager, mine))
    assert float(error.max()) <= 2 * float(allowed.max()) + 1e-7 * float(exact.hidden.abs().max())
    assert float(error.mean()) <= 2 * float(allowed.mean()) + 1e-8
    if lengths is not None:
        assert torch.equal(mine.hidden[1], eager.hidden[1])


@pytest.mark.parametrize("skipped", [1, 16, 37])
def test_skipped_outputs_are_not_computed(skipped: int) -> None:
    """The rest of the output has the same bits."""
    from sma_modules.ops.ema import operators

    flat = [each.float().squeeze(-1) for each in parameters(33, 2, False)]
    x, lengths = torch.randn(2, 45, 33, device=DEVICE), torch.tensor([45, 39], device=DEVICE)
    options = (None, None, False, 20, True, 0.0, False, False)
    whole = operators.ema_forward(x, *flat, lengths, *options)[0]
    with guarded():
        rest = operators.ema_forward(x, *flat, lengths - skipped, *options, skipped)[0]
    assert rest.is_contiguous()
    assert torch.equal(rest, whole[:, skipped:])


def test_what_it_leaves_to_others() -> None:
    weights = [weight.float() for weight in parameters(2, 2, False)]
    x = torch.randn(1, 4, 2, device=DEVICE)
    with using("triton"):
        with pytest.raises(BackendError, match="no gradient through a carried state"):
            ema(x.requires_grad_(), *weights, bidirectional=False, return_state=True)
        with pytest.raises(BackendError, match="got torch"):
            ema(x.double(), *weights, bidirectional=False)
        wide = [weight.float() for weight in parameters(2, 17, False)]
        with pytest.raises(BackendError, match="at most 16 states of a channel, got 17"):
            ema(x.detach(), *wide, bidirectional=False)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout(bidirectional: bool) -> None:
    """About the right share is dropped, the rest is scaled up, and the backward pass drops the same."""
    weights = [weight.float().requires_grad_() for weight in parameters(24, 2, bidirectional)]
    x = torch.randn(2, 40, 24, device=DEVICE, requires_grad=True)
    grad_y = torch.randn_like(x)
    with using("triton"):
        plain, _ = ema(x, *weights, bidirectional=bidirectional, activation="silu")
        y, _ = ema(x, *weights, bidirectional=bidirectional, activation="silu", dropout=0.25)
        again, _ = ema(x, *weights, bidirectional=bidirectional, activation="silu", dropout=0.25)
    kept = y != 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.04
    assert not torch.equal(kept, again != 0)
    for dim in (0, 1, 2):
        shifted = kept.roll(1, dim)
        assert abs(float((kept & shifted).float().mean()) - 0.75**2) < 0.06
    torch.testing.assert_close(y, torch.where(kept, plain / 0.75, 0.0))
    expected = torch.autograd.grad(plain, [x, *weights], torch.where(kept, grad_y / 0.75, 0.0))
    torch.testing.assert_close(torch.autograd.grad(y, [x, *weights], grad_y), expected, rtol=1e-4, atol=1e-5)


def test_same_bits() -> None:
    weights = [weight.float().requires_grad_() for weight in parameters(33, 4, True)]
    x = torch.randn(1, 40, 33, device=DEVICE, requires_grad=True)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        with using("triton"):
            y, _ = ema(x, *weights, bidirectional=True, truncation=20, activation="silu", dropout=0.1)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *weights])]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
    plain, states = [weight.float() for weight in parameters(33, 4, False)], []
    for _ in range(2):
        with using("triton"):
            _, state = ema(x.detach(), *plain, bidirectional=False, truncation=20, return_state=True)
        assert state is not None
        states.append(state.tensors())
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("lengths", [None, (-(2**40), 2**40)])
def test_nothing_outside_is_touched(lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that the launches make lies between guards; lengths that make no sense change nothing of that."""
    from sma_modules.ops.ema import operators

    guarded: list[Tensor] = []

    def guard(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = 1
        for extent in shape:
            size *= extent
        whole = torch.full((size + 512,), 77, dtype=dtype, device=DEVICE)
        guarded.append(whole)
        return whole[256 : 256 + size].view(shape)

    plain = Tensor.new_empty

    def new_empty(self: Tensor, *shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if options:  # the interpreter's own
            return plain(self, *shape, dtype=dtype, **options)
        return guard(shape[0] if isinstance(shape[0], tuple) else shape, dtype or self.dtype)

    def empty_like(self: Tensor, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return guard(tuple(self.shape), dtype or self.dtype)

    weights = [weight.float().contiguous() for weight in parameters(35, 3, True)]
    flat = [weight[..., 0].contiguous() if weight.dim() == 3 else weight for weight in weights]
    whole = torch.full((4, 45, 35), torch.nan, device=DEVICE)
    whole[1:3] = torch.randn(2, 45, 35, device=DEVICE)
    x = whole[1:3]
    where = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    y, pre, table, reach, _ = operators.ema_forward(x, *flat, where, None, None, True, 20, True, 0.0, True, False)
    dy = torch.ones(2, 45, 35, device=DEVICE)
    gradients = operators.ema_backward(dy, x, pre, table, reach, *flat, where, None, 20, 0.0)
    monkeypatch.undo()
    assert len(guarded) > 12
    for value in guarded:
        assert bool((value[:256] == 77).all())
        assert bool((value[-256:] == 77).all())
    assert all(bool(value.isfinite().all()) for value in (y, *gradients))


def test_compiles_in_one_graph() -> None:
    mixer = EMA.Config(n_state=2, truncation=20).build(d_model=3, causal=True).to(DEVICE)
    x = torch.randn(1, 40, 3, device=DEVICE)
    with using("triton"):
        expected = mixer.activated(x)[0]
        compiled = torch.compile(lambda value: mixer.activated(value)[0], fullgraph=True, backend="aot_eager")
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        names = [name for name, _ in mixer.named_parameters()]
        actual = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
        for name, got, want in zip(
            names, actual, torch.autograd.grad(expected.square().sum(), list(mixer.parameters())), strict=True
        ):
            torch.testing.assert_close(got, want, msg=name)


def test_operators() -> None:
    from sma_modules.ops.ema import operators

    weights = [weight.float() for weight in parameters(3, 2, False)]
    flat = [weight[..., 0].contiguous() if weight.dim() == 3 else weight for weight in weights]
    x = torch.randn(1, 20, 3, device=DEVICE)
    tests = ("test_schema", "test_faketensor")
    arguments = (x, *flat, torch.tensor([20], device=DEVICE), None, None, False, None, True, 0.0, True, False)
    torch.library.opcheck(operators.ema_forward.operator, arguments, test_utils=tests)
    _, pre, table, reach, _ = operators.ema_forward(*arguments)
    torch.library.opcheck(
        operators.ema_backward.operator, (x, x, pre, table, reach, *flat, None, None, None, 0.0), test_utils=tests
    )
    lengths = torch.tensor([20], device=DEVICE)
    torch.library.opcheck(
        operators.after_window.operator, (x, table, lengths, None, None, None, 0, 7, 2), test_utils=tests
    )


def test_mixer_activated() -> None:
    """The mixer's own way equals activation and dropout after its plain output."""
    mixer = EMA.Config(n_state=2).build(d_model=3, causal=False).to(DEVICE)
    x = torch.randn(1, 20, 3, device=DEVICE)
    with using("triton"):
        y, state = mixer.activated(x)
    torch.testing.assert_close(y, torch.nn.functional.silu(mixer(x)[0]))
    assert state is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation must be one of none, silu, got 'relu'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str) -> None:
    weights = [weight.float() for weight in parameters(2, 2, False)]
    with pytest.raises(ConfigError, match=message):
        ema(torch.randn(1, 4, 2, device=DEVICE), *weights, bidirectional=False, **change)


def compilation(kernel: str, bidirectional: bool, leaves: bool, skips: bool = False) -> Compilation:
    """At the real size of 16 states and 128 channels, in bfloat16, with the registers that a launch gives."""
    from sma_modules.ops.ema import sizes as tuned

    tensors = {"x": "bf16", "y": "bf16", "pre": "bf16", "dx": "bf16", "dy": "bf16", "source": "bf16"}
    tensors |= {"reach": "i32", "lengths": "i64", "seed": "i64"}
    names = (
        "scratch",
        "sums",
        "table",
        "omega",
        "hidden",
        "hidden_end",
        "fresh",
        "fresh_end",
        "grad",
        "partial",
        "out",
    )
    tensors |= dict.fromkeys(names, "fp32") | dict.fromkeys(("count", "count_end"), "i64") | {"history": "bf16"}
    numbers = dict.fromkeys(("batch", "length", "dim", "chunks", "taps", "n_state", "past", "blocks", "skipped"), "i32")
    signature = {name: f"*{kind}" for name, kind in tensors.items()} | numbers | {"dropout": "fp32", "scale": "fp32"}
    if kernel == "through_activation":
        flags: dict[str, Any] = {"SILU": True, "DROPOUT": True, "PLACES": tuned.PLACES}
        divisible = ["length", "dim"]
        return Compilation("sma_modules.ops.ema.triton_kernel", kernel, signature, flags, {"num_warps": 4}, divisible)
    if kernel == "window_end":
        flags = {"LENGTHS": True, "CARRIED": True, "N": 16, "BLOCK": 32, "WIDTH": 128, "AHEAD": 8}
        return Compilation("sma_modules.ops.ema.triton_kernel", kernel, signature, flags, {"num_warps": 4})
    sizes = {"DIRECTIONS": 2 if bidirectional else 1, "DIM": 128, "CHUNK": 128, "N": 16, "BLOCK": 32, "TILE": 16}
    flags = {"LENGTHS": True}
    options = {"num_warps": 1}
    if kernel == "chunk_sums":
        flags |= {"GRADIENT": leaves, "STEP": tuned.SUM_STEP}
        signature["source"] = "*fp32" if leaves else "*bf16"
    elif kernel == "window_sums":
        del sizes["DIRECTIONS"]
        flags |= {"STEP": tuned.SUM_STEP}
    else:
        flags |= {"MANY": True, "WINDOW": leaves or bidirectional, "LEAVES": leaves}
    if kernel == "forward":
        flags |= dict.fromkeys(("STREAM", "CARRIED"), False) | dict.fromkeys(("SILU", "SAVE", "DROPOUT"), True)
        flags |= {"STEP": tuned.FORWARD_STEP, "SKIPS": skips, "SAVE": not skips}
        options["maxnreg"] = tuned.LARGE_FORWARD_REGISTERS if leaves else tuned.FORWARD_REGISTERS
    if kernel == "backward":
        flags |= {"STEP": tuned.BACKWARD_STEP}
        options["maxnreg"] = tuned.LARGE_BACKWARD_REGISTERS if leaves else tuned.BACKWARD_REGISTERS
    return Compilation("sma_modules.ops.ema.triton_kernel", kernel, signature, sizes | flags, options)


def test_compiles_for_a_gpu() -> None:
    """Every state in a register, and without shared memory: no thread needs another's numbers."""
    scans = [
        (kernel, both, leaves)
        for kernel in ("forward", "backward")
        for both, leaves in ((True, True), (True, False), (False, False))
    ]
    asked = [compilation(*each) for each in [("chunk_sums", True, False), ("chunk_sums", True, True), *scans]]
    asked += [compilation("forward", False, leaves, skips=True) for leaves in (False, True)]
    asked.append(compilation("window_sums", False, False))
    found = compile_all([*asked, *(compilation(each, False, False) for each in ("through_activation", "window_end"))])
    assert [each.spilled for each in found] == [0] * len(found)
    assert [each.shared for each in found[: len(asked)]] == [0] * len(asked)
