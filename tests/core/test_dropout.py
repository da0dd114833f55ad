"""Dropout by 16 random bits an entry: the share, the mean, the seed, the gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sma.dropout import Dropout, add_dropout, dropout, dropout_


@pytest.mark.parametrize("p", [0.1, 0.15, 0.5, 0.9])
def test_the_share_and_the_mean(p: float) -> None:
    torch.manual_seed(0)
    n = 1_000_003
    y = dropout(torch.ones(n), p)
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(float((y == 0).double().mean()) - p) < 4 * deviation + 2**-17
    assert y.unique().numel() == 2
    assert float(y.double().mean()) == pytest.approx(1, abs=5 * deviation / (1 - p))


def test_neighbours_are_independent() -> None:
    """Four entries share a random number, of which each has bits of its own."""
    torch.manual_seed(1)
    kept = (dropout(torch.ones(400_000), 0.5) != 0).double().view(-1, 4)
    correlation = torch.corrcoef(kept.T) - torch.eye(4, dtype=torch.float64)
    assert float(correlation.abs().max()) < 4 / 100_000**0.5
    along = torch.corrcoef(torch.stack([kept[1:, 0], kept[:-1, 3]]))[0, 1]
    assert abs(float(along)) < 4 / 100_000**0.5


def test_the_seed_decides() -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout(torch.ones(5, 7), 0.3)

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_that_of_what_was_kept(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    y = dropout(x.transpose(0, 1), 0.25)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, (y != 0).transpose(0, 1))
    assert set(x.grad.unique().tolist()) == {0.0, torch.tensor(4 / 3, dtype=dtype).item()}


def test_nothing_to_drop() -> None:
    x = torch.randn(2, 3)
    assert dropout(x, 0.0) is x
    assert Dropout(0.5).eval()(x) is x
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert bool((Dropout(0.5)(torch.ones(100)) == 0).any())
    assert float(dropout(torch.ones(100), 1e-9).sum()) == 100, "a share that 16 bits cannot express"


@pytest.mark.parametrize("p", [0.0, 0.25, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_place_and_onto_another_are_the_same(p: float, dtype: torch.dtype) -> None:
    """Also where PyTorch's own dropout takes over, and with the same gradients."""
    x, onto = (torch.rand(3, 4, 5, dtype=dtype, requires_grad=True) for _ in range(2))  # in sums nothing cancels

    def drawn(function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        y = function()
        return (y, *torch.autograd.grad(y.square().sum(), (x, onto)))

    plain = drawn(lambda: onto + dropout(x, p))
    added = drawn(lambda: add_dropout(x, p, onto))
    inside = drawn(lambda: onto + dropout_(x * 1, p))
    for want, have, also in zip(plain, added, inside, strict=True):
        torch.testing.assert_close(have, want)
        assert torch.equal(also, want)


@pytest.mark.parametrize("p", [0.0, 0.25, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_are_added_before(p: float, dtype: torch.dtype) -> None:
    """The mask is that of the place at which a row lands."""
    index = torch.tensor([1, 5, 6, 11])
    inputs = [torch.rand(*shape, dtype=dtype, requires_grad=True) for shape in ((3, 4, 5), (3, 4, 5), (4, 5))]
    x, onto, rows = inputs

    def drawn(function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        y = function()
        return (y, *torch.autograd.grad(y.square().sum(), inputs))

    plain = drawn(lambda: onto + dropout(x.flatten(0, 1).index_add(0, index, rows).view_as(x), p))
    for want, have in zip(plain, drawn(lambda: add_dropout(x, p, onto, rows, index)), strict=True):
        torch.testing.assert_close(have, want)


def test_onto_a_wider_one() -> None:
    x, onto = torch.ones(4, 6, dtype=torch.bfloat16), torch.ones(4, 6)
    y = add_dropout(x, 0.5, onto)
    assert y.dtype == torch.float32
    assert set(y.unique().tolist()) == {1.0, 3.0}
