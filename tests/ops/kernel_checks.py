"""What the tests of kernels share: inputs, results by one backend, and how close two of them are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sma.ops import using
from sma.ops.row_norm import RowNorm
from sma.testing.precision import imprecision, known_to
from tests.devices import DEVICE, error_of

# Triton's interpreter cuts numbers off where it makes them bfloat16, instead of rounding.
LOW = (torch.bfloat16, torch.float16) if DEVICE.type == "cuda" else (torch.float16,)
DTYPES = (torch.float32, *LOW)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def mask_of(batch: int, length: int, rate: float = 0.3) -> Tensor:
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < rate
    if batch > 1:
        mask[1] = False
    return mask.to(DEVICE)


def differentiable(*values: Tensor | None) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in values if value is not None]


def results(run: Callable[..., Any], inputs: list[Tensor], backend: str, factors: Tensor | None = None) -> list[Tensor]:
    """Output and gradients by one backend; ``factors`` of the gradient that comes in, one for each number."""
    inputs = differentiable(*inputs)
    with using(backend):
        out = run(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        weights = [torch.linspace(-1, 1, each.numel(), device=DEVICE) for each in outs]
        if factors is not None:
            weights = [each * factors[: each.numel()] for each in weights]
        loss = sum((each.float() * w.view_as(each)).sum() for each, w in zip(outs, weights, strict=True))
        assert isinstance(loss, Tensor)
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [each.detach() for each in (*outs, *grads) if each is not None]


def assert_same(run: Callable[..., Any], inputs: list[Tensor], tolerance: float = 2e-5) -> None:
    for actual, expected in zip(results(run, inputs, "triton"), results(run, inputs, "reference"), strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        bound = tolerance * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
        assert error_of(actual, expected)[0] <= bound


def assert_precise(run: Callable[..., Any], draw: Callable[[int], list[Tensor]], dtype: torch.dtype) -> None:
    """As precise as the eager backend in the same precision (:mod:`sma.testing.precision`).

    Over several draws: a sum alone, such as the gradient of a single weight, may be right by chance.
    """
    draws = []
    for seed in range(8):
        low = [each.to(dtype) for each in draw(seed)]
        wide = [each.double() for each in low]
        exact = results(run, wide, "eager")
        # The gradient that comes in is known no better than the rest.
        factors = torch.ones(max(each.numel() for each in exact), dtype=torch.float64, device=DEVICE)
        known = known_to(lambda moved: results(run, moved[:-1], "eager", moved[-1]), exact, [*wide, factors])
        draws.append((results(run, low, "triton"), results(run, low, "eager"), exact, known))
    mine, plain, truth = ([_joined(each) for each in zip(*(draw[k] for draw in draws), strict=True)] for k in range(3))
    for i, (ours, eager, exact_one) in enumerate(zip(mine, plain, truth, strict=True)):
        units = [each[3][i] for each in draws]
        known_one = max(largest for largest, _ in units), sum(mean for _, mean in units) / len(units)
        why = imprecision(ours, eager, exact_one, known_one, in_16_bits=dtype != torch.float32)
        assert why is None, f"result {i}: {why}"


def _joined(values: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([each.flatten() for each in values])


def assert_sound(*calls: tuple[Any, tuple[Any, ...]]) -> None:
    """The custom operators behave as their schemas and fake functions say."""
    for call, arguments in calls:
        torch.library.opcheck(call.operator, arguments, test_utils=("test_schema", "test_faketensor"))


def norms(d: int) -> Iterator[RowNorm | None]:
    yield None
    yield RowNorm(False, 1e-5, None, None)
    yield RowNorm(False, 1e-5, numbers(1, seed=5), None)
    yield RowNorm(True, 1e-5, numbers(d, seed=5), numbers(d, seed=6))
