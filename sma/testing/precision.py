"""How precise an operation has to be: one rule, for the suite of operations and for every test of a kernel.

In 16 bits rounding is by far the largest error, and PyTorch's own operations say how much of it cannot be avoided: an
operation may err twice as much. In float32 such operations are often right by chance, where another order of the same
sum is not, so that twice their error is no measure. There the measure is the problem itself. An input is known to one
unit in its last place; a result is known no better than it moves when the inputs move by so much, and no better than
one unit in the last place of its own size. The first is the size of what was added up, also where it cancels. How far
an implementation may be beyond that is how its rounding errors add up: n of them, one after the other and each of half
a unit, are like a random walk ``sqrt(n) / 2`` units in the end, 16 for the thousand numbers that a test adds up at
most. Sums that go far up and come down again have to be taken in blocks to stay within that. Products in TF32 err by
thousands of units, and a row that is left out or counted twice by hundreds of thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

UNITS = 16
"""What rounding may cost in float32, in units of what cannot be known better."""
_DRAWS = 4


def differentiable(value: Any) -> bool:
    """Whether an argument is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def known_to(run: Callable[[Any], Sequence[Tensor]], exact: Sequence[Tensor], inputs: Any) -> list[tuple[float, float]]:
    """How well each result can be known in float32: the largest and the mean of what it moves, by entry.

    Args:
        run: from inputs in float64 to the results.
        exact: the results of ``inputs``.
        inputs: a sequence or a mapping; floating-point tensors in it, in float64, are moved, with a fixed seed.
    """
    generator = torch.Generator().manual_seed(0)
    unit = torch.finfo(torch.float32).eps

    def moved(value: Any) -> Any:
        if not differentiable(value):
            return value
        by = 2 * torch.rand(value.shape, dtype=torch.float64, generator=generator) - 1
        return value.detach().double() * (1 + unit * by.to(value.device))

    moves: list[list[Tensor]] = [[] for _ in exact]
    for _ in range(_DRAWS):
        if isinstance(inputs, dict):
            results = run({name: moved(value) for name, value in inputs.items()})
        else:
            results = run([moved(value) for value in inputs])
        for each, result, truth in zip(moves, results, exact, strict=True):
            each.append((result.double() - truth.double()).abs())
    found = []
    for each, truth in zip(moves, exact, strict=True):
        size, move = truth.detach().double().abs(), torch.stack(each)
        found.append((max(_largest(move), unit * _largest(size)), max(_mean(move), unit * _mean(size))))
    return found


def imprecision(
    mine: Tensor, plain: Tensor, exact: Tensor, known: tuple[float, float] = (0.0, 0.0), *, in_16_bits: bool
) -> str | None:
    """Why a result is not precise enough, or None.

    Args:
        mine: the result.
        plain: the same by PyTorch's own operations.
        exact: the same in float64.
        known: for float32, an entry of :func:`known_to`.
        in_16_bits: what was computed in: bfloat16 or float16, else float32.
    """
    for name, measure, least in (("max", _largest, known[0]), ("mean", _mean, known[1])):
        error, base = (measure((each.detach().double() - exact.detach().double()).abs()) for each in (mine, plain))
        if in_16_bits:
            # A fraction of one rounding, for results that PyTorch happens to get exactly right.
            allowed = 2 * base + torch.finfo(mine.dtype).eps * measure(exact.detach().double().abs()) / 4
        else:
            allowed = max(2 * base, UNITS * least)
        if not error <= allowed:  # an error that is not a number is none that is allowed
            return f"{name}: error {error:.2e} of at most {allowed:.2e}, PyTorch's own {base:.2e}"
    return None


def _largest(error: Tensor) -> float:
    return float(error.max()) if error.numel() else 0.0


def _mean(error: Tensor) -> float:
    return float(error.mean()) if error.numel() else 0.0
