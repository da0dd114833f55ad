"""The products of a decoding step: every backend is the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sma.errors import ShapeError
from sma.ops import using
from sma.ops.kernel import why_not_triton
from sma_modules.ops.gau_inputs import gau_inputs
from sma_modules.ops.gau_inputs.types import Affine
from sma_modules.ops.gau_output import OP as OUTPUT
from sma_modules.ops.gau_output import gau_output
from sma_modules.ops.gau_output.types import Around, Attended
from sma_modules.ops.gau_projections import OP as PROJECTIONS
from sma_modules.ops.gau_projections import gau_projections
from sma_modules.ops.gau_projections.types import Weights
from tests.kernels import Compilation, compile_all
from tests.ops.modules.kernel_checks import guarded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = why_not_triton(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(
    HERE is not None and "forced" not in HERE, reason="neither a GPU nor Triton's interpreter"
)
BACKENDS = ["eager", pytest.param("triton", marks=needs_triton)]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def some_of(slots: int) -> Tensor:
    return (torch.arange(slots) % 3 == 1).to(DEVICE)


def precise(backend: str) -> tuple[torch.dtype, float]:
    return (torch.float32, 2e-5) if backend == "triton" else (torch.float64, 1e-11)


def inputs(slots: int, dim: int, z: int, h: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = ((slots, dim), (dim, dim), (dim,), (z + 2 * h, dim), (z + 2 * h,), (2, z), (2, z))
    m, sw, sb, mw, mb, gamma, beta = (numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    return {
        "m": m, "skip": (sw, sb), "mx": (mw / 4, mb), "gamma": gamma, "beta": beta, "active": some_of(slots),
    }  # fmt: skip


SIZES = [(1, 6, 4, 3), (2, 40, 6, 50), (17, 9, 34, 5), (70, 3, 2, 1)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_projections(backend: str, size: tuple[int, int, int, int], turned: bool) -> None:
    dtype, tolerance = precise(backend)
    given = inputs(*size, dtype)
    position = torch.arange(size[0], device=DEVICE) * 1_000_003 if turned else None
    with using(backend):
        out = gau_projections(**given, position=position)
    wide = {name: each.double() for name, each in given.items() if isinstance(each, Tensor) and name != "active"}
    skip, mx = (tuple(each.double() for each in given[name]) for name in ("skip", "mx"))
    torch.testing.assert_close(out.skip.double(), F.linear(wide["m"], *skip), rtol=0, atol=tolerance * size[1])
    with using("eager"):
        expected = gau_inputs(F.linear(wide["m"], *mx), wide["gamma"], wide["beta"], position=position)
    # An angle of many turns is known to one unit in its last place, whatever computes it.
    turns = 0.0 if position is None else torch.finfo(torch.float64).eps * float(position.max())
    for name, one, other in zip("qkvr", out[1:], expected, strict=True):
        rows = given["active"]
        bound = (tolerance + turns) * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one[rows].double(), other[rows], rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("size", [(1, 6, 3), (2, 40, 300), (17, 9, 5), (70, 3, 1)], ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_output(backend: str, size: tuple[int, int, int]) -> None:
    dtype, tolerance = precise(backend)
    slots, dim, h = size
    x, weight, bias, skip, residual = (
        numbers(*shape, seed=i, dtype=dtype)
        for i, shape in enumerate(((slots, h), (dim, h), (dim,), (slots, dim), (slots, dim)))
    )
    active, confidence = some_of(slots), numbers(slots, seed=9, dtype=dtype).sigmoid()
    with using(backend):
        out = gau_output(x, weight, bias, active=active, confidence=confidence, skip=skip, residual=residual)
    y = F.linear(x.double(), weight.double(), bias.double()) * (confidence * active)[:, None]
    expected = F.silu(skip.double() + residual.double() + y)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * 10)


@needs_triton
def test_nobody_is_active() -> None:
    """Then what is left does not depend on the weights of the unit, whatever they hold."""
    given = inputs(3, 6, 4, 3, torch.float32)
    poisoned = tuple(torch.full_like(each, float("nan")) for each in given["mx"])
    nobody = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    with using("triton"):
        out = gau_projections(**{**given, "mx": poisoned, "active": nobody})
        y = gau_output(
            torch.zeros(3, 3, device=DEVICE), poisoned[0][:6, :3].contiguous(), poisoned[1][:6], active=nobody,
            confidence=torch.zeros(3, device=DEVICE), skip=out.skip, residual=given["m"],
        )  # fmt: skip
    torch.testing.assert_close(y, F.silu(F.linear(given["m"], *given["skip"]) + given["m"]), rtol=0, atol=1e-5)


@needs_triton
def test_rows_do_not_depend_on_each_other() -> None:
    given = inputs(5, 6, 4, 3, torch.float32)
    every = torch.ones(5, dtype=torch.bool, device=DEVICE)
    with using("triton"):
        whole = gau_projections(**{**given, "active": every})
        changed = given["m"].clone()
        changed[:4] *= 1000
        other = gau_projections(**{**given, "m": changed, "active": every})
    assert all(torch.equal(one[4], two[4]) for one, two in zip(whole, other, strict=True))


@needs_triton
def test_operators_are_sound() -> None:
    """Their descriptions for a compiler: shapes, and the tensors that they write to."""
    from sma_modules.ops.ema_step import launch as ema_step
    from sma_modules.ops.gau_output import launch as output
    from sma_modules.ops.gau_projections import launch as projections
    from sma_modules.ops.ring_attention import launch as ring

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=DEVICE)

    given = inputs(2, 6, 4, 3, torch.float32)
    m, (skip, skip_bias), (mx, mx_bias) = given["m"], given["skip"], given["mx"]
    live, position, counts = given["active"], zeros(2, dtype=torch.int64), zeros(2, 2, dtype=torch.int64)
    coefficients = (*(zeros(6, 3) for _ in range(4)), zeros(6))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (projections.run, (m, skip, skip_bias, mx, mx_bias, given["gamma"], given["beta"], position, 100.0, live)),
        (output.run, (zeros(2, 3), zeros(6, 3), zeros(6), live, zeros(2), m, m)),
        (
            ema_step.run,
            (
                m, zeros(1, 2, 6, 3), zeros(1, 2, 6, 3), zeros(2, 2, dtype=torch.int64), zeros(2, 4, 6), *coefficients,
                None, None, live, position, 4, True, True, 1e-5, True,
            ),
        ),
        (
            ring.run,
            (
                zeros(2, 1, 4), zeros(2, 1, 4), zeros(2, 1, 3), None, None, zeros(2, 71, 1, 4), zeros(2, 71, 1, 3),
                zeros(2, 71, dtype=torch.int64), counts, live, live, position, position, 70, 70, 0, 0, 0,
            ),
        ),
    ]  # fmt: skip
    for call, arguments in calls:
        torch.library.opcheck(call.operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_kernels_write_nowhere_else() -> None:
    given = inputs(3, 6, 4, 3, torch.float32)
    with guarded(), using("triton"):
        out = gau_projections(**given)
        gau_output(
            out.v.nan_to_num(), given["skip"][0][:, :3].contiguous(), given["skip"][1], active=given["active"],
            confidence=torch.ones(3, device=DEVICE), skip=out.skip, residual=given["m"],
        )  # fmt: skip


@needs_triton
def test_low_precision() -> None:
    """Sums are float32: the error is at most twice that of the eager backend."""
    half = torch.float16
    given = inputs(9, 200, 16, 20, half)
    exact = {
        name: tuple(part.double() for part in each) if isinstance(each, tuple) else each.double()
        for name, each in given.items()
        if name != "active"
    }
    every = torch.ones(9, dtype=torch.bool, device=DEVICE)

    def run(backend: str, **arguments: Any) -> tuple[Tensor, ...]:
        with using(backend):
            return tuple(gau_projections(**arguments, position=torch.arange(9, device=DEVICE)))

    expected = run("eager", **exact, active=every)
    ours, eager = (run(backend, **{**given, "active": every}) for backend in ("triton", "eager"))
    for one, other, wanted in zip(ours, eager, expected, strict=True):
        assert one.dtype == half
        for measure in (torch.max, torch.mean):
            mine, base = (float(measure((each.double() - wanted).abs())) for each in (one, other))
            assert mine <= 2 * base


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: gau_output(x, x, x[0], active=x[0] > 0, confidence=x[0], skip=x[:, :2], residual=x),
            "skip like residual",
        ),
        (
            lambda x: gau_projections(x, (x, x[0]), (x[:, :2], x[0]), gamma=x[:2], beta=x[:2], active=x[0] > 0),
            "weights must take 3 features",
        ),
        (
            lambda x: gau_projections(x, (x, x[0]), (x, x[0]), gamma=x[:2, :2], beta=x[:2, :2], active=x[0] > 0),
            r"mx must give z \+ 2h features",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        call(torch.zeros(3, 3))


def test_other_weights_have_a_reason() -> None:
    given = inputs(2, 6, 4, 3, torch.float32)
    half = tuple(each.half() for each in given["mx"])
    m, active = given["m"], given["active"]
    reasons = PROJECTIONS.explain(
        m, Weights(*given["skip"], *half), Affine(given["gamma"], given["beta"], None, 100.0), active
    )
    assert reasons["triton"] == "the kernel takes weights of the dtype of the tokens, torch.float32, got torch.float16"
    reasons = OUTPUT.explain(Attended(m, *half), Around(active, m[:, 0], m, m))
    assert "got torch.float16" in str(reasons["triton"])


def test_fits_an_h100() -> None:
    """No register spills to memory, at the sizes of the language models, for one slot and for many."""
    asked = []
    module = "sma_modules.ops.gau_projections.triton_kernel"
    for kind in ("*bf16", "*fp32"):
        for rows in (16, 64) if kind == "*bf16" else (16,):
            names = ("m", "skip_weight", "skip_bias", "mx_weight", "mx_bias", "gamma", "beta", "skip")
            signature = {**dict.fromkeys((*names, *"qkvr"), kind), "position": "*i64", "active": "*i1", "slots": "i32"}
            constants = {
                "D": 616, "OUT": 616, "Z": 128, "H": 1232, "LOG2_THETA": 13.3, "SKIPS": 20, "SHARED": 4, "WIDE": 39,
                "BM": rows, "BN": 32, "BK": 128,
            }  # fmt: skip
            options = {"num_warps": 4, "num_stages": 4}
            asked.append(Compilation(module, "projection_kernel", signature, constants, options))
            names = ("x", "weight", "bias", "skip", "residual", "out")
            signature = {**dict.fromkeys(names, kind), "confidence": "*fp32", "active": "*i1", "slots": "i32"}
            constants = {"H": 1232, "D": 616, "BM": rows, "BN": 16, "BK": 256}
            asked.append(Compilation(module, "output_kernel", signature, constants, {"num_warps": 4, "num_stages": 3}))
    for each, needs in zip(asked, compile_all(asked), strict=True):
        assert needs.spilled == 0, each
        assert needs.shared <= 227 * 1024, each
