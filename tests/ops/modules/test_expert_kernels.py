"""Sorting by expert, dispatch, combine and the grouped products: backends, kernels, memory, compilation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import BackendError, ShapeError
from sma.ops import using
from sma.ops.kernel import why_not_triton
from sma.testing import OpCase, OpSuite
from sma.testing.precision import differentiable, known_to
from sma_modules.modules.moe import MoE
from sma_modules.ops.expert_matmul import ACTIVATED, expert_matmul
from sma_modules.ops.expert_matmul import OP as EXPERT_MATMUL
from sma_modules.ops.expert_matmul.grouped import _aligned, running_ends
from sma_modules.ops.expert_order import COMBINE, DISPATCH, combine, dispatch, order_by_expert
from tests.kernels import Compilation, compile_all
from tests.ops.modules.kernel_checks import DEVICE, DTYPES, check_errors, check_low_precision, guarded, run

with using("triton"):
    HERE = why_not_triton(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(HERE is not None, reason=str(HERE))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile
]

# Rows of each expert: some, an empty one first, between and last, all in one, one expert, more than a tile, none.
COUNTS = ([3, 1, 2], [0, 5, 0, 2, 0], [0, 17], [4], [33, 20, 1], [0, 0])


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def products() -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    for counts in COUNTS:
        for d_in, d_out in ((20, 37), (16, 8)):
            args = numbers(sum(counts), d_in), numbers(len(counts), d_in, d_out), torch.tensor(counts)
            yield f"{counts} {d_in} {d_out}", args


def choices() -> Iterator[tuple[str, Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    for tokens, top_k, experts in ((9, 2, 4), (1, 1, 1), (0, 2, 3), (40, 3, 5), (150, 1, 2)):
        yield f"{tokens} {top_k} {experts}", torch.randint(experts, (tokens, top_k), generator=generator), experts
    yield "all to the last", torch.full((12, 2), 6), 7
    yield "empty experts", torch.randint(2, (12, 2), generator=generator) * 3 + 1, 6


class TestExpertMatmul(OpSuite):
    op = EXPERT_MATMUL
    compiles = False  # the eager backend reads the counts

    def cases(self) -> Iterator[OpCase]:
        for name, args in products():
            yield OpCase(name, args)


class TestDispatch(OpSuite):
    op = DISPATCH

    def cases(self) -> Iterator[OpCase]:
        for name, choice, experts in choices():
            yield OpCase(name, (numbers(choice.shape[0], 3), order_by_expert(choice, experts)))


class TestCombine(OpSuite):
    op = COMBINE

    def cases(self) -> Iterator[OpCase]:
        for name, choice, experts in choices():
            weight = numbers(*choice.shape).abs()
            yield OpCase(name, (numbers(choice.numel(), 3), weight, order_by_expert(choice, experts)))


def to_device(*args: Any) -> list[Any]:
    """Tensors on the device, 64-bit floats in 32 bits."""
    on = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in args]
    return [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in on]


@needs_triton
@pytest.mark.parametrize("case", list(products()), ids=lambda case: case[0])
def test_products_equal_the_reference(case: Any) -> None:
    args = to_device(*case[1])
    with guarded():
        mine = run("triton", expert_matmul, args)
    for a, b in zip(mine, run("reference", expert_matmul, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_in_low_precision(dtype: torch.dtype) -> None:
    for counts in ([3, 0, 14], [40]):
        args = to_device(numbers(sum(counts), 24), numbers(len(counts), 24, 40), torch.tensor(counts))
        check_low_precision(expert_matmul, args, dtype)


@needs_triton
@pytest.mark.parametrize("case", list(choices()), ids=lambda case: case[0])
def test_sorting_equals_the_reference(case: Any) -> None:
    choice, experts = case[1].to(DEVICE), case[2]
    orders = []
    for backend in ("triton", "eager", "reference"):
        with using(backend):
            orders.append(order_by_expert(choice, experts))
    for name in ("order", "inverse", "counts", "ends"):
        mine, eager, reference = (getattr(order, name) for order in orders)
        assert mine.dtype == eager.dtype == reference.dtype
        assert torch.equal(mine, eager), name
        assert torch.equal(mine, reference), name


@needs_triton
def test_sorting_in_several_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    from sma_modules.ops.expert_order import launch

    monkeypatch.setattr(launch, "SORT_PROGRAMS", 4)
    monkeypatch.setattr(launch, "SORT_CELLS", 64)
    choice = torch.randint(5, (101, 2), device=DEVICE)
    with using("triton"), guarded():
        mine = order_by_expert(choice, 5)
    expected = choice.flatten().argsort(stable=True)
    assert torch.equal(mine.order, expected)
    assert torch.equal(mine.inverse, expected.argsort())
    assert mine.counts.tolist() == [int((choice == e).sum()) for e in range(5)]


@needs_triton
def test_numbers_out_of_range_still_find_rows() -> None:
    choice = torch.tensor([[7, -3], [1, 2**40]], device=DEVICE)
    with using("triton"), guarded():
        order = order_by_expert(choice, 3)
    assert sorted(order.order.tolist()) == [0, 1, 2, 3]
    assert order.counts.tolist() == [1, 1, 2]


@needs_triton
@pytest.mark.parametrize("case", list(choices()), ids=lambda case: case[0])
def test_movement_equals_the_reference(case: Any) -> None:
    choice, experts = case[1].to(DEVICE), case[2]
    order = order_by_expert(choice, experts)
    x, rows, weight = to_device(numbers(choice.shape[0], 37), numbers(choice.numel(), 37), numbers(*choice.shape))
    with guarded():
        moved = run("triton", dispatch, [x, order])
        joined = run("triton", combine, [rows, weight, order])
    assert torch.equal(moved[0], run("reference", dispatch, [x, order])[0])
    torch.testing.assert_close(moved[1], run("eager", dispatch, [x, order])[1])
    for a, b in zip(joined, run("reference", combine, [rows, weight, order]), strict=True):
        torch.testing.assert_close(a, b)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_movement_in_low_precision(dtype: torch.dtype) -> None:
    choice = torch.randint(4, (21, 3), device=DEVICE)
    order = order_by_expert(choice, 4)
    x, rows, weight = to_device(numbers(21, 40), numbers(63, 40), numbers(21, 3))
    check_low_precision(dispatch, [x, order], dtype)
    check_low_precision(combine, [rows, weight, order], dtype)


@needs_triton
def test_same_bits_twice() -> None:
    args = to_device(numbers(40, 24), numbers(3, 24, 40), torch.tensor([30, 0, 10]))
    for a, b in zip(run("triton", expert_matmul, args), run("triton", expert_matmul, args), strict=True):
        assert torch.equal(a, b)


@needs_triton
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_and_product_in_one(dtype: torch.dtype, gated: bool) -> None:
    for counts in ([5, 0, 9], [14], [0, 0]):
        rows = sum(counts)
        up, gate, weight = to_device(numbers(rows, 24), numbers(rows, 24).flip(0), numbers(len(counts), 24, 10))
        args = [up, gate if gated else None, "silu", weight, torch.tensor(counts, device=DEVICE)]
        with guarded():
            run("triton", ACTIVATED, args)
        check_low_precision(ACTIVATED, args, dtype)


@needs_triton
@pytest.mark.parametrize(("gated", "kept"), [(False, 1), (True, 2)])
def test_hidden_rows_are_not_kept(gated: bool, kept: int) -> None:
    """Of width 40 only what the first products gave is there for the backward pass."""
    moe = MoE.Config(n_experts=3, d_hidden=40, gated=gated).build(d_model=5).to(DEVICE)
    saved: dict[int, Tensor] = {}
    with (
        using("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x),
    ):
        moe(torch.randn(7, 5, device=DEVICE))
    assert [tuple(x.shape) for x in saved.values() if x.dim() == 2 and x.shape[-1] == 40] == [(14, 40)] * kept


@needs_triton
def test_a_second_derivative_is_refused() -> None:
    moe = MoE.Config(n_experts=3, d_hidden=6, d_shared=4).build(d_model=5).to(DEVICE)
    x = torch.randn(7, 5, device=DEVICE, requires_grad=True)
    with using("triton"), pytest.raises(BackendError, match="this backend has no second derivative"):
        torch.autograd.grad(moe(x).output.square().sum(), x, create_graph=True)


@needs_triton
def test_counts_that_do_not_add_up_stay_inside() -> None:
    x, weight = to_device(numbers(9, 20), numbers(3, 20, 24))
    for wrong in ([2, 3, 1], [9, 9, 9], [-5, 4, 100], [2**40, 0, 0]):
        counts = torch.tensor(wrong, device=DEVICE)
        with using("triton"), guarded():
            y = EXPERT_MATMUL(x, weight, counts)
        assert y.isfinite().all()
    with using("triton"), guarded():
        # Not even ends that do not ascend may lead outside.
        EXPERT_MATMUL(x, weight, counts, torch.tensor([70, -8, 9], dtype=torch.int32, device=DEVICE))
    assert running_ends(torch.tensor([2, -1, 4]), 9).tolist() == [2, 2, 9]


@needs_triton
def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    x, weight = to_device(numbers(9, 20), numbers(3, 20, 24))
    counts = torch.tensor([4, 2, 3], device=DEVICE)
    x[4] = float("nan")
    x.requires_grad_(), weight.requires_grad_()
    with using("triton"):
        y = expert_matmul(x, weight, counts)
    others = torch.arange(9, device=DEVICE) != 4
    assert y[others].isfinite().all()
    (grad,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert grad[[0, 2]].isfinite().all()


@needs_triton
def test_operators_are_what_the_compiler_expects() -> None:
    from sma_modules.ops.expert_matmul import launch as matmul
    from sma_modules.ops.expert_order import launch as moving

    x, weight, rows = to_device(numbers(4, 5), numbers(4, 2), numbers(8, 5))
    order = order_by_expert(torch.randint(3, (4, 2), device=DEVICE), 3)
    matrices = torch.randn(3, 5, 6, device=DEVICE)
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (moving.sort, (torch.randint(3, (4, 2), device=DEVICE), 3)),
        (moving.spread, (x, order.order, 2)),
        (moving.gather, (rows, order.inverse, weight, 2)),
        (moving.combine_backward, (x, rows, order.inverse, weight)),
        (matmul.rows_times_matrices, (rows, matrices, order.ends, False)),
        (matmul.rows_times_rows, (rows, rows, order.ends)),
    ]
    for function, args in checks:
        torch.library.opcheck(function.operator, args, test_utils=("test_schema", "test_faketensor"))


@needs_triton
@pytest.mark.parametrize("gated", [False, True])
def test_a_mixture_compiles_in_one_graph(gated: bool) -> None:
    moe = MoE.Config(n_experts=3, d_hidden=6, gated=gated).build(d_model=5).to(DEVICE)
    x = torch.randn(7, 5, device=DEVICE)
    torch._dynamo.reset()
    with using("triton"):
        compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
        results = []
        for call in (moe, compiled):
            out = call(x)
            total = out.output.square().sum() + sum(out.losses.values())
            results.append([out.output, *torch.autograd.grad(total, list(moe.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixture_errs_no_more_than_the_eager_one(dtype: torch.dtype) -> None:
    """In float32, and under autocast to the others."""
    moe = MoE.Config(n_experts=5, d_hidden=12, top_k=2, d_shared=8).build(d_model=16).to(DEVICE)
    x = torch.randn(21, 16, device=DEVICE)

    def results(backend: str, moe: MoE, x: Tensor) -> list[Tensor]:
        with using(backend), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            out = moe(x)
        total = out.output.double().square().sum() + sum(out.losses.values())
        return [out.output.detach(), *torch.autograd.grad(total, list(moe.parameters()))]

    wide = copy.deepcopy(moe).double()

    def exactly(inputs: list[Tensor]) -> list[Tensor]:
        torch.nn.utils.vector_to_parameters(inputs[1], wide.parameters())
        return results("eager", wide, inputs[0])

    inputs = [x.double(), torch.nn.utils.parameters_to_vector(wide.parameters()).detach()]
    exact = exactly(inputs)
    known = known_to(exactly, exact, inputs) if dtype == torch.float32 else None
    check_errors(results("triton", moe, x), results("eager", moe, x), exact, known)


def test_what_grouped_mm_is_given_has_no_gaps() -> None:
    whole = torch.randn(6, 8, dtype=torch.bfloat16)
    assert _aligned(whole) is whole
    for x in (
        whole[:, :4],
        whole.t(),
        whole[:1, 0].expand(3, 8),
        whole[0].expand(1, 8),
        whole.flatten()[3:19].view(2, 8),
    ):
        aligned = _aligned(x)
        assert torch.equal(aligned, x)
        assert aligned.stride() == (x.shape[1], 1)
        assert aligned.storage_offset() % 8 == 0


def test_grouped_mm_says_why_not() -> None:
    x, weight, counts = torch.ones(3, 2), torch.ones(1, 2, 2), torch.tensor([3])
    assert "bfloat16" in str(EXPERT_MATMUL.explain(x, weight, counts)["grouped_mm"])
    with pytest.raises(BackendError, match="grouped_mm"), using("grouped_mm"):
        expert_matmul(x.bfloat16(), weight.bfloat16(), counts)


@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 9, reason="needs a GPU of capability 9.x"
)
@pytest.mark.parametrize("counts", [[3, 0, 14, 0], [0, 0, 40], [5]])
def test_grouped_mm_equals_the_kernels(counts: list[int]) -> None:
    args = to_device(numbers(sum(counts), 24), numbers(len(counts), 24, 40), torch.tensor(counts))
    args = [a.bfloat16() if differentiable(a) else a for a in args]
    mine = run("grouped_mm", expert_matmul, args)
    joined = [args[0], None, "gelu", *args[1:]]
    exact = run("eager", ACTIVATED, [a.double() if differentiable(a) else a for a in joined])
    grouped = run("grouped_mm", ACTIVATED, joined)
    check_errors(grouped, run("eager", ACTIVATED, joined), exact, None)
    for a, b in zip(mine, run("triton", expert_matmul, args), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))
    assert not mine[2][torch.tensor(counts) == 0].any()


# PyTorch says so each time that the mode is switched on. Synchronising is an error here, not a warning.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_mixture_never_synchronises_with_the_device() -> None:
    moe = MoE.Config(n_experts=8, d_hidden=64, d_shared=32).build(d_model=64).to(DEVICE, torch.bfloat16)
    x = torch.randn(300, 64, device=DEVICE, dtype=torch.bfloat16)
    for looking in (False, True):  # the first time kernels are compiled
        torch.cuda.set_sync_debug_mode("error" if looking else "default")
        try:
            out = moe(x)
            (out.output.float().sum() + sum(out.losses.values())).backward()
            if looking:
                with pytest.raises(RuntimeError, match="synchronizing"):
                    x.sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: order_by_expert(torch.zeros(3, dtype=torch.int64), 2), r"choice must be \(T, k\) integers"),
        (lambda: dispatch(torch.zeros(3, 2), order_by_expert(torch.zeros(2, 2, dtype=torch.int64), 2)), "T = 2 tokens"),
        (
            lambda: combine(
                torch.zeros(3, 2), torch.zeros(2, 2), order_by_expert(torch.zeros(2, 2, dtype=torch.int64), 2)
            ),
            r"rows must be \(4, D\) and weight \(2, 2\)",
        ),
        (
            lambda: expert_matmul(torch.zeros(3, 2), torch.zeros(1, 2, 2), torch.tensor([3]), torch.tensor([3])),
            "ends must be int32",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        call()


def test_kernels_fit_an_h100() -> None:
    """Nothing spills and shared memory suffices: E 8 and 64, widths 1024 and 4096, 32K rows."""
    pytest.importorskip("triton")
    from sma_modules.ops.expert_matmul.launch import GROUP, gradient_tile, product_tile

    asked = []
    for pointer, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
        for experts, rows in ((8, 32768), (64, 2048)):
            dots = {"PRECISION": "tf32x3", "WIDEN": False}
            for transposed in (False, True):
                depth, cols = (4096, 1024) if transposed else (1024, 4096)
                tile = product_tile(dtype, rows, experts, depth, cols)
                constants = {"DEPTH": depth, "COLS": cols, "TRANSPOSED": transposed, "E": experts, "E_PAD": experts}
                constants |= {"BM": tile.rows, "BN": tile.cols, "BK": tile.depth, "GROUP": GROUP, **dots}
                signature = dict.fromkeys(("x", "weight", "out"), pointer) | {"ends": "*i32"}
                signature |= dict.fromkeys(("rows", "row_tiles"), "i32")
                options = {"num_warps": tile.warps, "num_stages": tile.stages}
                module = "sma_modules.ops.expert_matmul.triton_kernel"
                asked.append(Compilation(module, "product_kernel", signature, constants, options))
            tile = gradient_tile(dtype, rows, experts, 1024, 4096)
            constants = {"D_IN": 1024, "D_OUT": 4096, "BM": tile.rows, "BN": tile.cols, "BK": tile.depth, **dots}
            signature = dict.fromkeys(("x", "grad", "out"), pointer) | {"ends": "*i32", "rows": "i32"}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            asked.append(Compilation(module, "gradient_kernel", signature, constants, options))
    asked.extend(_movement())
    for request, resources in zip(asked, compile_all(asked), strict=True):
        assert resources.spilled == 0, (request, resources)
        assert resources.shared < 227 * 1024, (request, resources)


def _movement() -> Iterator[Compilation]:
    module = "sma_modules.ops.expert_order.triton_kernel"
    tile = {"D": 1024, "TOP_K": 2, "BD": 1024}
    signature = dict.fromkeys(("x", "rows", "y", "grad", "grad_rows"), "*bf16")
    signature |= dict.fromkeys(("weight", "grad_weight"), "*fp32") | dict.fromkeys(("order", "inverse"), "*i64")
    signature |= dict.fromkeys(("n_rows", "n_tokens", "n_entries", "share", "programs"), "i32")
    yield Compilation(module, "spread_kernel", signature, {**tile, "BR": 4}, {"num_warps": 4})
    yield Compilation(module, "gather_kernel", signature, {**tile, "BT": 4, "WEIGHTED": True}, {"num_warps": 4})
    yield Compilation(module, "combine_backward_kernel", signature, {**tile, "BT": 4}, {"num_warps": 4})
    signature |= {"choice": "*i64", "counts": "*i32", "total_out": "*i64", "ends_out": "*i32"}
    for experts, block in ((8, 1024), (64, 128)):
        constants = {"E": experts, "E_PAD": experts, "BLOCK": block}
        yield Compilation(module, "count_kernel", signature, constants, {"num_warps": 8})
        yield Compilation(module, "place_kernel", signature, {**constants, "PROGRAMS": 128}, {"num_warps": 8})
