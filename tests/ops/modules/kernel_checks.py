"""What the tests of kernels share: the device, forced runs with gradients, guarded memory, the low-precision rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.ops import using
from sma.testing.precision import differentiable, imprecision, known_to

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter rounds to bfloat16 towards zero, which doubles the error: there float16 stands for both.
DTYPES = (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
_MARGIN = 64


def run(
    backend: str, function: Callable[..., Tensor], args: Sequence[Any], factors: Tensor | None = None
) -> list[Tensor]:
    """Output of ``function`` and the gradients of its floating-point arguments, under a forced backend; ``factors`` of
    the gradient that comes in, one for each number.
    """
    args = [a.detach().clone().requires_grad_() if differentiable(a) else a for a in args]
    with using(backend):
        out = function(*args)
        # In bfloat16, so that they are the same numbers in every dtype.
        weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.bfloat16).view_as(out)
        inputs = [a for a in args if differentiable(a)]
        weights = weights.to(out.dtype) if factors is None else weights * factors.view_as(out)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def check_low_precision(function: Callable[..., Tensor], args: Sequence[Any], dtype: torch.dtype) -> None:
    """Output and gradients are as precise as those of eager operations, see :mod:`sma.testing.precision`."""
    args = [a.to(dtype) if differentiable(a) else a for a in args]

    wide = [a.double() if differentiable(a) else a for a in args]
    exact = run("eager", function, wide)
    known = None
    if dtype == torch.float32:
        # The gradient that comes in is known no better than the rest.
        factors = torch.ones(exact[0].numel(), dtype=torch.float64, device=exact[0].device)
        known = known_to(lambda moved: run("eager", function, moved[:-1], moved[-1]), exact, [*wide, factors])
    check_errors(run("triton", function, args), run("eager", function, args), exact, known)


def check_errors(
    mine: Sequence[Tensor],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
    known: Sequence[tuple[float, float]] | None,
) -> None:
    """Each of ``mine`` is like the ``eager`` one and as precise; ``known`` (how well) in float32, None in 16 bits."""
    for i, (a, b, c) in enumerate(zip(mine, eager, exact, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        why = (
            imprecision(a, b, c, in_16_bits=True) if known is None else imprecision(a, b, c, known[i], in_16_bits=False)
        )
        assert why is None, f"result {i}: {why}"


@contextmanager
def guarded() -> Iterator[list[Tensor]]:
    """``new_empty`` gives memory full of NaN (integers: -1) inside a wall of it; the wall must still stand at the end.

    A test then sees values that a kernel forgot to write, and fails when one wrote outside.
    """
    walls: list[Tensor] = []
    plain = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        if options.get("device") == "meta":  # nothing lies there
            return plain(self, shape, dtype=dtype, **options)
        count = int(torch.Size(shape).numel())
        whole = plain(self, count + 2 * _MARGIN, dtype=dtype or self.dtype, **options)
        whole.fill_(float("nan") if whole.is_floating_point() else -1)
        walls.extend((whole[:_MARGIN], whole[_MARGIN + count :]))
        return whole[_MARGIN : _MARGIN + count].view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield walls
    assert walls
    filled = (wall.isnan() if wall.is_floating_point() else wall == torch.tensor(-1).to(wall) for wall in walls)
    assert all(bool(wall.all()) for wall in filled)
