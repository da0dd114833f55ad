"""The rule of precision lets pass what the order of a sum does in float32, and no mistake."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sma.testing.precision import imprecision, known_to

ROWS = 1024


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def product(args: list[Tensor]) -> list[Tensor]:
    return [args[0] @ args[1]]


def total(args: list[Tensor]) -> list[Tensor]:
    return [args[0].sum(0)]


def one_after_the_other(x: Tensor) -> Tensor:
    return torch.stack([*itertools.accumulate(x)])[-1]


def tf32(x: Tensor) -> Tensor:
    """Rounded to the ten bits that tensor cores take of a float32."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + (1 << 12)) >> 13 << 13).view(torch.float32)


def judge(mine: Tensor, run: object, args: list[Tensor]) -> str | None:
    """What the rule says when PyTorch's own result is exact to the last bit, the hardest case."""
    (exact,) = run(args)  # type: ignore[operator]
    (known,) = known_to(run, [exact], args)  # type: ignore[arg-type]
    return imprecision(mine, exact.float(), exact, known, in_16_bits=False)


# Of one sign; of both; and all but cancelling: the second half takes away what the first has added up.
SUMS = {"one sign": numbers(ROWS, 5).abs(), "both": numbers(ROWS, 5)}
SUMS["cancelling"] = (
    torch.cat([SUMS["one sign"][: ROWS // 2], -SUMS["one sign"][: ROWS // 2] * (1 + 2**-12)]).float().double()
)


@pytest.mark.parametrize("name", SUMS)
def test_the_order_of_a_sum_is_free(name: str) -> None:
    x = SUMS[name]
    shuffled = x[torch.randperm(ROWS)]
    for rows in (x, shuffled, x.flip(0)):
        assert judge(rows.float().view(64, 16, 5).sum(1).sum(0), total, [x]) is None
        if name != "cancelling" or rows is shuffled:
            assert judge(one_after_the_other(rows.float()), total, [x]) is None


def test_a_sum_that_loses_digits_for_nothing_is_seen() -> None:
    """Far up and down again, one number after the other: in blocks it would be right."""
    x = SUMS["cancelling"]
    assert judge(one_after_the_other(x.float()), total, [x]) is not None


@pytest.mark.parametrize("name", SUMS)
def test_a_row_left_out_or_counted_twice_is_seen(name: str) -> None:
    x = SUMS[name]
    for more in (-x[7], x[7]):
        assert judge((x.sum(0) + more).float(), total, [x]) is not None
    assert judge((x.sum(0) + x[7] / 100).float(), total, [x]) is not None


@pytest.mark.parametrize("depth", [4, 64, ROWS])
def test_products_in_tf32_are_seen(depth: int) -> None:
    args = [numbers(33, depth), numbers(depth, 20)]
    assert judge(args[0].float() @ args[1].float(), product, args) is None
    assert judge(tf32(args[0]) @ tf32(args[1]), product, args) is not None


def test_sums_in_16_bits_are_seen() -> None:
    x = SUMS["both"]
    assert judge(x.bfloat16().sum(0).float(), total, [x]) is not None
    assert judge(x.float().sum(0).half().float(), total, [x]) is not None


def test_a_bias_of_the_mean_is_seen() -> None:
    """Small beside the largest entry, but of every entry."""
    x = torch.cat([numbers(1, 9999), torch.full((1, 1), 1e4, dtype=torch.float64)], 1)
    (exact,) = total([x])
    assert judge(exact.float() * (1 + 3e-3), total, [x]) is not None
    assert judge(torch.cat([exact[:-1].float() + 1e-3, exact[-1:].float()]), total, [x]) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_16_bits", [False, True])
def test_what_is_not_finite_is_seen(bad: float, in_16_bits: bool) -> None:
    exact = torch.ones(3, dtype=torch.float64)
    mine = torch.tensor([1.0, bad, 1.0])
    assert imprecision(mine, exact.float(), exact, (1e-7, 1e-7), in_16_bits=in_16_bits) is not None


def test_in_16_bits_twice_the_error_of_pytorch_is_allowed() -> None:
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    plain = (exact + 0.03).half()
    assert imprecision((exact - 0.06).half(), plain, exact, in_16_bits=True) is None
    assert "max: error 6.4" in str(imprecision((exact - 0.064).half(), plain, exact, in_16_bits=True))
    assert "mean: " in str(imprecision((exact - 0.05).half(), torch.tensor([1.0, -1.97]), exact, in_16_bits=True))


def test_nothing_has_no_error() -> None:
    x = torch.zeros(0, 3, dtype=torch.float64)
    assert judge(x.float(), lambda args: [args[0]], [x]) is None
