"""The feed-forward operation and its activation: backends, kernels, memory, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.errors import ConfigError, ShapeError
from sma.ops import Op, using
from sma.ops.backend import forget
from sma.ops.kernel import why_not_triton
from sma.testing import OpCase, OpSuite
from sma_modules.modules.ffn import FFN
from sma_modules.ops.feed_forward import ACTIVATE, FEED_FORWARD, Projection, activate, feed_forward
from sma_modules.ops.feed_forward.op import _network_signature
from sma_modules.ops.feed_forward.types import Network
from tests.kernels import Compilation, compile_all
from tests.ops.modules.kernel_checks import DEVICE, DTYPES, check_low_precision, guarded, run

with using("triton"):
    HERE = why_not_triton(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(HERE is not None, reason=str(HERE))
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile
]
ACTIVATIONS = ("relu", "gelu", "silu")
EYE = torch.eye(2)
SHAPES = ((0, 4, 6, 4), (1, 3, 8, 5), (63, 4, 9, 4), (70, 5, 33, 3))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def networks() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for activation in ACTIVATIONS:
        for gated, bias in ((False, True), (True, True), (True, False)):
            for rows, d_in, d_hidden, d_out in SHAPES:
                up, gate = ((numbers(d_hidden, d_in), numbers(d_hidden) if bias else None) for _ in range(2))
                down = numbers(d_out, d_hidden), numbers(d_out) if bias else None
                args = (numbers(rows, d_in), *up, *(gate if gated else (None, None)), *down, activation)
                yield f"{activation}{' gated' * gated}{' bias' * bias} {rows} {d_hidden}", args


def activations() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for activation in ACTIVATIONS:
        for gated in (False, True):
            for rows, d in ((0, 3), (1, 1), (63, 5), (3, 129)):
                # Away from 0, where relu has no derivative.
                up, gate = (value + value.sign() / 10 for value in (numbers(rows, d), numbers(rows, d).flip(1)))
                yield f"{activation}{' gated' * gated} {rows} {d}", (up, gate if gated else None, activation)


def flat(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: Any,
) -> tuple[Tensor, Network]:
    """The arguments of a backend from single tensors, which the suite differentiates."""
    gated = None if gate is None else Projection(gate, gate_bias)
    return x, Network(Projection(up, up_bias), gated, Projection(down, down_bias), activation)


def call(*args: Any) -> Tensor:
    x, network = flat(*args)
    return feed_forward(x, *network)


FLAT = Op("feed_forward_of_tensors", lambda *args: _network_signature(*flat(*args)))
for _backend in FEED_FORWARD.backends.values():
    FLAT.register(
        _backend.name,
        lambda *args, run=_backend.run: run(*flat(*args)),
        applies=_backend.applies,
        pays=_backend.pays,
    )
forget(FLAT)  # not an operation of the library


class TestFeedForward(OpSuite):
    op = FLAT

    def cases(self) -> Iterator[OpCase]:
        for name, args in networks():
            if args[-1] != "relu" or args[0].shape[0] < 2:  # finite differences find the kink of relu
                yield OpCase(name, args)


class TestActivate(OpSuite):
    op = ACTIVATE

    def cases(self) -> Iterator[OpCase]:
        for name, args in activations():
            yield OpCase(name, args)


def to_device(*args: Any) -> list[Any]:
    """Tensors on the device, in float32."""
    return [a.to(DEVICE, torch.float32) if isinstance(a, Tensor) else a for a in args]


@needs_triton
@pytest.mark.parametrize("case", list(networks()), ids=lambda case: case[0])
def test_feed_forward_equals_the_reference(case: Any) -> None:
    args = to_device(*case[1])
    with guarded():
        mine = run("triton", call, args)
    for a, b in zip(mine, run("reference", call, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("case", list(activations()), ids=lambda case: case[0])
def test_activate_equals_the_reference(case: Any) -> None:
    args = to_device(*case[1])
    with guarded():
        mine = run("triton", ACTIVATE, args)
    for a, b in zip(mine, run("reference", ACTIVATE, args), strict=True):
        torch.testing.assert_close(a, b)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", [call, activate], ids=["feed_forward", "activate"])
def test_low_precision(operation: Callable[..., Tensor], dtype: torch.dtype) -> None:
    for name, args in networks() if operation is call else activations():
        if "63" in name or "129" in name:
            check_low_precision(operation, to_device(*args), dtype)


@needs_triton
def test_gelu_in_16_bits_is_rounded_once() -> None:
    """What stands in for erf there is known to 16 bits, far more than float16 keeps."""

    def unit(values: Tensor) -> Tensor:
        return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent.clamp(min=-13) - 11)

    x = torch.linspace(-7, 7, 4001, device=DEVICE).half()[None].requires_grad_()
    wide = x.detach().double().requires_grad_()
    with using("triton"):
        y = activate(x, None, "gelu")
    exact = activate(wide, None, "gelu")
    (slope,), (exact_slope,) = (torch.autograd.grad(each.sum(), at) for each, at in ((y, x), (exact, wide)))
    assert bool(((y - exact).abs() <= 0.55 * unit(exact.detach())).all())
    assert bool(((slope - exact_slope).abs() <= 0.6 * unit(exact_slope.abs().clamp(min=1 / 8))).all())


@needs_triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(activation: Any) -> None:
    """Beyond what exp can take, and NaN: as in PyTorch."""
    values = [-1e30, -3e4, -90.0, -1e-30, 0.0, 1e-30, 90.0, 3e4, 1e30, float("nan")]
    x = torch.tensor([values], device=DEVICE)
    results = []
    for backend in ("triton", "eager"):
        up = x.clone().requires_grad_()
        with using(backend):
            y = activate(up, None, activation)
        results.append((y, *torch.autograd.grad(y, up, torch.ones_like(y))))
    torch.testing.assert_close(results[0][0], results[1][0], equal_nan=True)
    finite = x.isfinite()
    torch.testing.assert_close(results[0][1][finite], results[1][1][finite])


@needs_triton
def test_same_bits_twice() -> None:
    args = to_device(*dict(networks())["gelu gated bias 70 33"])
    for a, b in zip(run("triton", call, args), run("triton", call, args), strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    args = to_device(*dict(networks())["silu gated bias 70 33"])
    args[0][4] = float("nan")
    with using("triton"):
        y = call(*args)
    assert y[4].isnan().all()
    assert y[torch.arange(70, device=DEVICE) != 4].isfinite().all()


@needs_triton
def test_gradients_that_nobody_wants_are_not_computed() -> None:
    args = to_device(*dict(networks())["gelu bias 63 9"])
    for i in (0, 1, 2, 5, 6):
        chosen = [a.clone().requires_grad_(i == j) if isinstance(a, Tensor) else a for j, a in enumerate(args)]
        grads = []
        for backend in ("triton", "eager"):
            with using(backend):
                grads.extend(torch.autograd.grad(call(*chosen).square().sum(), chosen[i]))
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@needs_triton
def test_operators_are_what_the_compiler_expects() -> None:
    from sma_modules.ops.feed_forward import launch as kernels

    up, gate = to_device(numbers(3, 5), numbers(3, 5))
    for gated in (None, gate):
        torch.library.opcheck(
            kernels.hidden_values.operator, (up, gated, "gelu"), test_utils=("test_schema", "test_faketensor")
        )
        for other, *flags in ((None, False, False), (up[:, :2], False, True), (up, True, True)):
            args = (up, up, gated, other, "silu", *flags)
            torch.library.opcheck(
                kernels.activate_backward.operator, args, test_utils=("test_schema", "test_faketensor")
            )


@needs_triton
@pytest.mark.parametrize("gated", [False, True])
def test_a_network_compiles_in_one_graph(gated: bool) -> None:
    ffn = FFN.Config(d_hidden=6, gated=gated).build(d_model=5).to(DEVICE)
    x = torch.randn(7, 5, device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    with using("triton"):
        compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
        results = [[y, *torch.autograd.grad(y.square().sum(), [x, *ffn.parameters()])] for y in (ffn(x), compiled(x))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@needs_triton
def test_autocast_is_followed() -> None:
    ffn = FFN.Config(d_hidden=24, gated=True).build(d_model=8).to(DEVICE)
    x = torch.randn(2, 9, 8, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("triton", "eager"):
        with using(backend), torch.autocast(DEVICE, torch.bfloat16):
            y = ffn(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *ffn.parameters()])])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * float(b.detach().abs().max()))


def test_projections_that_are_more_than_weights_are_called() -> None:
    """Hooks run, and what replaces a projection is used."""
    ffn = FFN.Config(d_hidden=6).build(d_model=4)
    x, seen = torch.randn(3, 4), []
    expected = ffn(x)
    handle = ffn.up.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(ffn(x), expected)
    assert seen
    handle.remove()
    ffn.down = nn.Sequential(ffn.down, nn.ReLU())
    torch.testing.assert_close(ffn(x), expected.relu())


def test_small_inputs_take_the_eager_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from sma_modules.ops.feed_forward import op

    for check in ("why_not_triton", "why_not_interpreted"):
        monkeypatch.setattr(op, check, lambda *_: None)
    small, large = torch.empty(4, 8), torch.empty(1 << 12, 1 << 8)
    assert "faster below" in str(ACTIVATE.explain(small, None, "gelu")["triton"])
    assert ACTIVATE.explain(large, None, "gelu")["triton"] is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: activate(torch.ones(1, 2), None, "tanh"), ConfigError, "one of relu, gelu, silu, got 'tanh'"),  # type: ignore[arg-type]
        (lambda: activate(torch.ones(1, 2), torch.ones(1, 3), "relu"), ShapeError, "gate must be like up"),
        (
            lambda: feed_forward(torch.ones(1, 3), Projection(torch.eye(2)), None, Projection(torch.eye(2)), "relu"),
            ShapeError,
            r"x \(K, d_in\), up \(d_hidden, d_in\) and down",
        ),
        (
            lambda: feed_forward(
                torch.ones(1, 2), Projection(torch.eye(2)), Projection(torch.ones(3, 2)), Projection(EYE), "relu"
            ),
            ShapeError,
            "gate must be like up",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_kernels_fit_an_h100() -> None:
    """Nothing spills at a hidden width of 4096."""
    pytest.importorskip("triton")
    from sma_modules.ops.feed_forward.launch import BLOCK_BYTES, ROWS, TILE_COLS, TILE_ROWS, WARPS

    module, asked = "sma_modules.ops.feed_forward.triton_kernel", []
    for pointer, size in (("*bf16", 2), ("*fp32", 4)):
        signature = dict.fromkeys(("up", "gate", "out", "grad", "grad_up", "grad_gate", "hidden", "other"), pointer)
        signature |= {"sums": "*fp32", "n": "i32", "n_rows": "i32"}
        for activation in ACTIVATIONS:
            for gated in (False, True):
                constants = {"ACTIVATION": activation, "GATED": gated}
                forward = {**constants, "BLOCK": BLOCK_BYTES // size}
                backward = {**constants, "D": 4096, "D_OTHER": 1024, "HIDDEN": True, "SUMS": True}
                backward |= {"BR": TILE_ROWS, "BD": TILE_COLS, "ROWS": ROWS}
                options = {"num_warps": WARPS}
                asked.append(Compilation(module, "activate_kernel", signature, forward, options))
                asked.append(Compilation(module, "activate_backward_kernel", signature, backward, options))
    for request, resources in zip(asked, compile_all(asked), strict=True):
        assert resources.spilled == 0, (request, resources)
