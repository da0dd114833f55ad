"""The inputs of a gated attention unit: every backend is the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sma.errors import BackendError, ShapeError
from sma.ops import using
from sma.ops.kernel import why_not_triton
from sma.testing.precision import imprecision, known_to
from sma_modules.ops.gau_inputs import OP, gau_inputs
from sma_modules.ops.gau_inputs.types import Affine
from tests.kernels import Compilation, compile_all

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = why_not_triton(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(
    HERE is not None and "forced" not in HERE, reason="neither a GPU nor Triton's interpreter"
)
NAMES = ("q", "k", "v", "r")


def case(rows: int, z: int, h: int, turned: bool) -> tuple[list[Tensor], Tensor | None]:
    """Differentiable inputs in float64, and positions."""
    sizes = ((rows, z + 2 * h), (2, z), (2, z))
    position = torch.randint(0, 10_000_000, (rows,), device=DEVICE) if turned else None
    return [torch.randn(*size, dtype=torch.float64, device=DEVICE) for size in sizes], position


def results(
    inputs: list[Tensor],
    position: Tensor | None,
    backend: str,
    dtype: torch.dtype,
    affine: torch.dtype,
    factors: Tensor | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients, with ``mx`` in ``dtype`` and the affine maps in ``affine``; ``factors`` of the gradient
    that comes in, one for each number.
    """
    mx, gamma, beta = (
        x.detach().to(kind).requires_grad_() for x, kind in zip(inputs, (dtype, affine, affine), strict=True)
    )
    with using(backend):
        outputs = gau_inputs(mx, gamma, beta, position=position)
    weights = [torch.linspace(-2, 2, y.numel(), dtype=torch.float64, device=DEVICE).view_as(y).sin() for y in outputs]
    if factors is not None:
        weights = [w * factors[: w.numel()].view_as(w) for w in weights]
    assert all(y.dtype == dtype for y in outputs)
    grads = torch.autograd.grad(outputs, (mx, gamma, beta), [w.to(dtype) for w in weights])
    assert [grad.dtype for grad in grads] == [dtype, affine, affine]
    return dict(zip((*NAMES, "mx", "gamma", "beta"), (x.detach().double() for x in (*outputs, *grads)), strict=True))


SIZES = list(itertools.product((0, 1, 37), (4, 6), (3, 16), (False, True)))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_triton)])
def test_equals_the_reference(size: tuple[int, int, int, bool], backend: str) -> None:
    inputs, position = case(*size)
    exact = results(inputs, position, "reference", torch.float64, torch.float64)
    dtype = torch.float32 if backend == "triton" else torch.float64
    for name, x in results(inputs, position, backend, dtype, dtype).items():
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5 * max(1, size[0])
        torch.testing.assert_close(x, exact[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("turned", [False, True])
def test_gradcheck(turned: bool) -> None:
    inputs, position = case(3, 4, 2, turned)
    with using("eager"):
        assert torch.autograd.gradcheck(
            lambda *x: gau_inputs(*x, position=position), [x.requires_grad_() for x in inputs]
        )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_as_precise_as_eager(dtype: torch.dtype, turned: bool) -> None:
    """With the affine maps in float32, as under autocast."""
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off instead of rounding it")
    inputs, position = case(400, 16, 20, turned)
    inputs = [inputs[0].to(dtype).double(), *(x.float().double() for x in inputs[1:])]
    exact = results(inputs, position, "eager", torch.float64, torch.float64)
    ours = results(inputs, position, "triton", dtype, torch.float32)
    eager = results(inputs, position, "eager", dtype, torch.float32)
    # The gradient that comes in is known no better than the rest.
    factors = torch.ones(max(each.numel() for each in exact.values()), dtype=torch.float64, device=DEVICE)

    def moved(x: list[Tensor]) -> list[Tensor]:
        return [*results(x[:-1], position, "eager", torch.float64, torch.float64, x[-1]).values()]

    known = known_to(moved, [*exact.values()], [*inputs, factors])
    for (name, expected), units in zip(exact.items(), known, strict=True):
        why = imprecision(ours[name], eager[name], expected, units, in_16_bits=dtype != torch.float32)
        assert why is None, f"{name}, {why}"


@needs_triton
def test_same_bits_twice() -> None:
    inputs, position = case(70, 6, 5, True)
    one, two = (results(inputs, position, "triton", torch.float32, torch.float32) for _ in range(2))
    assert all(torch.equal(x, two[name]) for name, x in one.items())


@needs_triton
def test_a_poisoned_token_stays_by_itself() -> None:
    inputs, position = case(40, 6, 5, True)
    clean = results(inputs, position, "triton", torch.float32, torch.float32)
    inputs[0][9] = float("nan")
    poisoned = results(inputs, position, "triton", torch.float32, torch.float32)
    others = [row for row in range(40) if row != 9]
    for name in (*NAMES, "mx"):
        assert torch.equal(poisoned[name][others], clean[name][others]), name
        assert poisoned[name][9].isnan().all(), name


@needs_triton
def test_a_strided_view_is_read_where_it_lies() -> None:
    inputs, position = case(9, 6, 5, True)
    mx, gamma, beta = (x.float() for x in inputs)
    wide = torch.full((9, 40), float("nan"), device=DEVICE)
    wide[:, 7:23] = mx
    with using("triton"):
        outputs = zip(
            gau_inputs(wide[:, 7:23], gamma, beta, position=position),
            gau_inputs(mx, gamma, beta, position=position),
            strict=True,
        )
        assert all(torch.equal(one, two) for one, two in outputs)


@needs_triton
# The compiler itself instantiates autograd functions, which PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph() -> None:
    inputs, position = case(9, 6, 5, True)
    mx, gamma, beta = (x.float().requires_grad_() for x in inputs)
    with using("triton"):
        compiled = torch.compile(gau_inputs, fullgraph=True, backend="aot_eager")
        ours, plain = (call(mx, gamma, beta, position=position) for call in (compiled, gau_inputs))
    assert all(map(torch.equal, ours, plain))
    both = (torch.autograd.grad([y.sum() for y in outputs], (mx, gamma, beta)) for outputs in (ours, plain))
    assert all(map(torch.equal, *both))


@needs_triton
def test_operators_are_sound() -> None:
    from sma_modules.ops.gau_inputs import launch

    inputs, position = case(9, 6, 5, True)
    arguments = (*(x.float() for x in inputs), position, 10000.0)
    torch.library.opcheck(launch.forward.operator, arguments)
    torch.library.opcheck(launch.backward.operator, (*launch.forward(*arguments), *arguments))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 9), (2, 4), (2, 4)), r"mx must be \(K, 4 \+ 2h\), got \(5, 9\)"),
        (((5, 10), (3, 4), (3, 4)), r"gamma and beta must be \(2, z\), got \(3, 4\) and \(3, 4\)"),
        (((4, 10), (2, 4), (2, 4)), r"position must be \(4,\), got \(5,\)"),
        (((5, 9), (2, 3), (2, 3)), "z must be even for rotary positions, got 3"),
    ],
)
def test_bad_input_is_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        gau_inputs(*(torch.randn(*shape) for shape in shapes), position=torch.arange(5))


def test_what_the_kernel_cannot_do_has_a_reason() -> None:
    inputs, _ = case(2, 4, 3, False)
    if OP.explain(inputs[0], Affine(inputs[1], inputs[2], None, 10000.0))["triton"] is None:
        pytest.fail("the kernel has no float64")
    wide = torch.zeros(2, 2000)
    with using("triton"), pytest.raises(BackendError, match="at most 1024 features, got 2000"):
        gau_inputs(torch.zeros(1, 2000), wide, wide)


def test_fits_an_h100() -> None:
    """No register spills to memory, at the sizes of the language model and of Text."""
    asked = []
    for z, h, turned in ((128, 1232, True), (64, 256, False)):
        size = {"ROW": z + 2 * h, "LOG2_THETA": 13.28771237954945, "Z": z, "ZP": z, "H": h, "BH": 256}
        common = {"mx": "*bf16", "gamma": "*fp32", "beta": "*fp32", "position": "*i64", "n_rows": "i32"}
        for name, rows, more in (
            ("forward_kernel", 8, {"q": "*bf16", "k": "*bf16", "v": "*bf16", "r": "*bf16"}),
            ("backward_kernel", 16, {f"d{n}": "*bf16" for n in "qkvr"} | {"d_mx": "*bf16", "partial": "*fp32"}),
        ):
            constants = {**size, "BM": rows} | ({} if turned else {"position": None})
            asked.append(Compilation("sma_modules.ops.gau_inputs.triton_kernel", name, common | more, constants))
    for each, needs in zip(asked, compile_all(asked), strict=True):
        assert needs.spilled == 0, each
        assert needs.shared <= 227 * 1024, each
