"""append: the backends against the reference; the kernels between walls, twice, compiled and for the hardware."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import BackendError, ShapeError
from sma.ops import using
from sma.ops.append import AppendedRows, append
from sma.routing import Packed
from tests.devices import DEVICE, needs_triton
from tests.kernels import Compilation, compile_all
from tests.ops.modules.kernel_checks import guarded

BACKENDS = ["eager", pytest.param("triton", marks=needs_triton)]
HAD = {"nothing": [0, 0, 0, 0], "some": [3, 0, 70, 5], "everything": [64, 65, 1000, 64]}


def case(
    had: list[int],
    *,
    capacity: int = 64,
    rate: float = 0.5,
    length: int = 50,
    width: int = 30,
    spare: int | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...], Packed]:
    """Keys, values and positions; the second sequence gets nothing. What is not remembered is NaN."""
    generator = torch.Generator().manual_seed(len(had) + capacity + length)
    mask = torch.rand(len(had), length, generator=generator) < rate
    mask[1:2] = False
    packed = Packed.from_mask(mask.to(DEVICE), capacity=None if spare is None else max(int(mask.sum()) + spare, 1))
    kinds = (((2, 3), torch.float32), ((width,), torch.float16), ((), torch.int64))
    was, new = (
        [(torch.randn(*first, *shape, generator=generator) * 100).to(dtype) for shape, dtype in kinds]
        for first in ((len(had), capacity), (packed.index.numel(),))
    )
    for each in was[:2]:
        for b, count in enumerate(had):
            each[b, : capacity - min(count, capacity)] = float("nan")
    count = torch.tensor(had, dtype=torch.int64, device=DEVICE)
    return tuple(each.to(DEVICE) for each in was), count, tuple(each.to(DEVICE) for each in new), packed


def assert_same(actual: AppendedRows, expected: AppendedRows, batch: int) -> None:
    """Bit for bit, but for rows of the sequence of nothing."""
    for name in ("cu_seqlens", "start", "counts"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    real = int(expected.cu_seqlens[batch])
    for one, other in zip(actual.both, expected.both, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one[:real], other[:real])
    for one, other in zip(actual.after, expected.after, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spare", [None, 0, 30, -20])
@pytest.mark.parametrize("had", HAD)
def test_backends_do_what_the_reference_does(had: str, spare: int | None, backend: str) -> None:
    for rate in (0.0, 0.5, 1.0):
        given = case(HAD[had], rate=rate, spare=spare)
        with using("reference"):
            expected = append(*given)
        with using(backend):
            assert_same(append(*given), expected, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [0, 1, 3, 200])
@pytest.mark.parametrize("spare", [None, 5])
def test_odd_sizes(capacity: int, spare: int | None, backend: str) -> None:
    for had, length, width in (([5], 1, 1), ([0], 0, 300), ([9] * 17, 3, 2), ([2, 3, 4], 129, 5), ([3, 1], 4, 300)):
        given = case(had, capacity=capacity, length=length, width=width, spare=spare)
        with using("reference"):
            expected = append(*given)
        with using(backend):
            assert_same(append(*given), expected, len(had))


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_comes_in_the_dtype_of_the_new_rows(backend: str) -> None:
    was, count, (new, *_), packed = case(HAD["everything"])
    with using(backend):
        found = append(was[:1], count, (new.half(),), packed)
    assert found.both[0].dtype == found.after[0].dtype == torch.float16
    with using("reference"):
        assert_same(found, append(was[:1], count, (new.half(),), packed), 4)


@needs_triton
@pytest.mark.parametrize("spare", [None, 7])
def test_kernels_write_all_of_it_and_nothing_else(spare: int | None) -> None:
    given = case(HAD["some"], spare=spare)
    with using("reference"):
        expected = append(*given)
    with using("triton"):
        with guarded():
            found = append(*given)
        again = append(*given)
    assert_same(found, expected, 4)
    if spare is not None:
        given[0][0].nan_to_num_(), given[0][1].nan_to_num_()
        with using("triton"), guarded():
            found = append(*given)
        assert all(bool(each.isfinite().all()) for each in found.both), "rows that nobody needs hold something"
        return
    for one, other in zip((*found.both, *found.after), (*again.both, *again.after), strict=True):
        assert torch.equal(one, other)


def test_gradients_are_those_of_the_reference() -> None:
    for spare in (None, 6):
        (was, *_), count, (new, *_), packed = case([3, 0, 9, 5], capacity=6, length=5, spare=spare)
        found = []
        for backend in ("eager", "reference"):
            inputs = [each.double().nan_to_num().requires_grad_() for each in (was, new)]
            with using(backend):
                out = append((inputs[0],), count, (inputs[1],), packed)
            real = out.both[0][: int(out.cu_seqlens[4])]
            loss = (real * torch.linspace(1, 2, real.numel(), device=DEVICE).view_as(real)).sum() + out.after[0].sum()
            found.append(torch.autograd.grad(loss, inputs))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@needs_triton
def test_kernels_have_no_gradient() -> None:
    was, count, new, packed = case(HAD["some"])
    with using("triton"), pytest.raises(BackendError, match="the kernel has no gradient"):
        append(was[:1], count, (new[0].requires_grad_(),), packed)


@needs_triton
def test_compiles_in_one_graph() -> None:
    given = case(HAD["some"], spare=3)
    torch._dynamo.reset()
    with using("triton"):
        compiled: Any = torch.compile(append, fullgraph=True, backend="aot_eager")
        assert_same(compiled(*given), append(*given), 4)


@needs_triton
def test_operators_are_sound() -> None:
    from sma.ops.append import launch as kernels

    was, count, new, packed = case(HAD["some"], spare=3)
    found = kernels.bounds(count, packed.cu_seqlens, 64)
    calls: tuple[tuple[Any, tuple[Any, ...]], ...] = (
        (kernels.bounds, (count, packed.cu_seqlens, 64)),
        (kernels.rows, (was[0], new[0], found[0], packed.cu_seqlens, 4 * 64 + new[0].shape[0])),
    )
    for call, arguments in calls:
        torch.library.opcheck(call.operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_kernels_fit_the_hardware() -> None:
    from sma.ops.append.launch import warps_for

    module, integers = "sma.ops.append.triton_kernel", dict.fromkeys(("batch", "sequences", "capacity"), "i32")
    pointers = dict.fromkeys(("count", "arrived", "cu_seqlens", "start", "after"), "*i64")
    asked = [
        Compilation(
            module,
            "bounds_kernel",
            {**pointers, **integers},
            {"FIXED": True, "BLOCK": block},
            {"num_warps": warps_for(block)},
        )
        for block in (2, 128, 1024)
    ]
    for kind, width, block_r, block_d in (("*bf16", 1232, 8, 256), ("*bf16", 128, 16, 128), ("*i64", 1, 128, 1)):
        types = dict.fromkeys(("was", "new", "both", "after"), kind) | dict.fromkeys(("total", "rows"), "i32")
        sizes = {"WIDTH": width, "STEPS": 5, "BLOCK_R": block_r, "BLOCK_D": block_d}
        asked.append(
            Compilation(
                module,
                "rows_kernel",
                {**types, "cu_seqlens": "*i64", "arrived": "*i64", **integers},
                sizes,
                {"num_warps": 4},
            )
        )
    for resources in compile_all(asked):
        assert resources.spilled == 0
        assert resources.registers <= 128


def test_what_does_not_fit_is_refused() -> None:
    was, count, new, packed = case(HAD["some"])
    with pytest.raises(ShapeError, match=r"append: must remember \(B, capacity, ...\) for rows \(K, ...\) of"):
        append(was, count, new[:2], packed)
    with pytest.raises(ShapeError, match="append: must remember"):
        append((), count, (), packed)
    with pytest.raises(ShapeError, match="append: needs 4 counts and"):
        append(was, count[:3], new, packed)
    with pytest.raises(ShapeError, match="append: needs 4 counts and"):
        append(was, count, tuple(each[:-1] for each in new), packed)
