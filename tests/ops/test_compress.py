"""compress: every backend is the reference, what passes through keeps its gradient, kernels stay in bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import ShapeError
from sma.ops import using
from sma.ops.compress import OP, compress, compress_through
from sma.ops.extract import extract
from sma.ops.narrow_linear import narrow_linear
from sma.routing import Packed
from sma.testing import OpCase, OpSuite
from tests.devices import DEVICE, needs_triton
from tests.ops.kernel_checks import assert_same, assert_sound, mask_of, results
from tests.ops.kernel_checks import numbers as kernel_numbers
from tests.ops.packed_cases import masks, numbers


class TestCompress(OpSuite):
    op = OP
    moves_data = True

    def cases(self) -> Iterator[OpCase]:
        for name, mask in masks():
            yield OpCase(name, (numbers(*mask.shape, 3), Packed.from_mask(mask)))
        yield OpCase("no features", (numbers(2, 4), Packed.from_mask(torch.tensor([[True, False, True, True]] * 2))))


@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("torch_scatter", marks=pytest.mark.scatter)])
def test_what_is_inactive_never_leaks(name: str) -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    packed = Packed.from_mask(mask)
    x = numbers(2, 3, 4).masked_fill(~mask[..., None], float("nan")).requires_grad_()
    with using(name):
        y = extract(compress(x, packed), packed)
    assert torch.equal(y, x.detach().nan_to_num(0.0))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, mask[..., None].expand_as(x).double())


def test_extract_undoes_compress() -> None:
    for name, mask in masks():
        packed = Packed.from_mask(mask)
        h = numbers(int(mask.sum()), 2)
        assert torch.equal(compress(extract(h, packed), packed), h), name


def test_each_is_the_gradient_of_the_other() -> None:
    packed = Packed.from_mask(torch.tensor([[True, False, True, False], [False, True, True, True]]))
    x, h = numbers(2, 4, 3).requires_grad_(), numbers(5, 3)
    (grad,) = torch.autograd.grad(compress(x, packed), x, h)
    assert torch.equal(grad, extract(h, packed))


@pytest.mark.parametrize("used", [("tokens",), ("x",), ("logits",), ("tokens", "x", "logits")], ids=",".join)
def test_gradients_that_pass_through_are_the_sum(used: tuple[str, ...]) -> None:
    """On a CPU they are added in place; gradients of gradients see the same sums."""
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    packed = Packed.from_mask(mask)
    x, weight, bias, after = numbers(2, 4, 6), numbers(2, 6), numbers(2), numbers(3, 6)
    inputs = [each.requires_grad_() for each in (x, weight, bias, after)]

    def loss() -> Tensor:
        logits, through = narrow_linear(x, weight, bias)
        tokens, through = compress_through(through, packed)
        parts = {"tokens": tokens, "x": through @ after.t(), "logits": logits}
        return torch.stack([parts[name].pow(3).sum() for name in used]).sum()

    def gradients() -> list[Tensor]:
        first = torch.autograd.grad(loss(), inputs, allow_unused=True, materialize_grads=True)
        graph = torch.autograd.grad(loss(), inputs, create_graph=True, allow_unused=True, materialize_grads=True)
        total = torch.stack([each.square().sum() for each in graph]).sum()
        second = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        for with_graph, without in zip(graph, first, strict=True):
            torch.testing.assert_close(with_graph, without)
        return [*first, *second]

    ours = gradients()
    with using("reference"):
        theirs = gradients()
    for have, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(have, want)


def test_compile_keeps_one_graph_through_the_gradient() -> None:
    packed = Packed.from_mask(torch.tensor([[True, False, True], [True, True, False]]))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(x: Tensor) -> Tensor:
        return extract(compress(x, packed) * 2, packed)

    x = numbers(2, 3, 2).requires_grad_()
    y = doubled(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, extract(compress(x, packed) * 2, packed))
    assert torch.equal(grad, 2 * extract(torch.ones(4, 2, dtype=torch.float64), packed))


def test_wrong_shapes_are_refused() -> None:
    packed = Packed.from_mask(torch.tensor([[True, False, True]]))
    for run in (compress, compress_through):
        with pytest.raises(ShapeError, match=r"compress: x must begin with \(B, L\) = \(1, 3\)"):
            run(torch.randn(1, 4, 2), packed)


@needs_triton
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("capacity", [None, 7, 200])
def test_data_movement_is_exact(rate: float, capacity: int | None) -> None:
    packed = Packed.from_mask(mask_of(3, 50, rate), capacity=capacity)
    rows, x, square = packed.index.numel(), kernel_numbers(3, 50, 20), torch.eye(20, device=DEVICE)
    h = kernel_numbers(rows, 20, seed=2)

    def through(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, same = compress_through(x, packed)
        return tokens, same @ square

    moves: tuple[tuple[Callable[..., Any], Tensor], ...] = (
        (lambda x: compress(x, packed), x),
        (lambda h: extract(h, packed), h),
    )
    for run, value in moves:
        for actual, expected in zip(results(run, [value], "triton"), results(run, [value], "reference"), strict=True):
            assert torch.equal(actual, expected)
    assert_same(through, [x], 1e-6)


@needs_triton
def test_nothing_around_the_output_is_touched() -> None:
    """Rows and indices that are out of range write nowhere."""
    from sma.ops.compress.launch import ELEMENTS, add_, take

    whole = torch.full((3, 4 * ELEMENTS), 7.0, device=DEVICE)
    index = torch.tensor([-5, 2**40, 3, 11, -(2**40)], device=DEVICE)
    into = whole[1, : 8 * 12].view(8, 12)
    add_(into, index, torch.ones(5, 12, device=DEVICE))
    assert (whole[0] == 7).all()
    assert (whole[1, 8 * 12 :] == 7).all()
    assert (whole[2] == 7).all()
    assert into.sum(1).tolist() == [84.0] * 3 + [96.0] + [84.0] * 4
    assert take(into, index).sum(1).tolist() == [0.0, 0.0, 96.0, 0.0, 0.0]


@needs_triton
def test_operators_are_sound() -> None:
    from sma.ops.compress import launch

    packed = Packed.from_mask(mask_of(2, 9))
    x, h = kernel_numbers(18, 4), kernel_numbers(packed.index.numel(), 4)
    assert_sound((launch.take, (x, packed.index)), (launch.add_, (x.clone(), packed.index, h)))
