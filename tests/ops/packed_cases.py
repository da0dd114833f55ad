"""Masks and numbers that the tests of data movement share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LENGTHS = (0, 1, 2, 63, 100, 129)


def masks() -> Iterator[tuple[str, Tensor]]:
    """Nothing active, everything active, and halves with an empty row, at each length."""
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        some = torch.rand(3, length, generator=generator) < 0.5
        some[1] = False
        yield f"some of {length}", some
        yield f"none of {length}", torch.zeros(2, length, dtype=torch.bool)
        yield f"all of {length}", torch.ones(2, length, dtype=torch.bool)
    yield "no row", torch.ones(0, 5, dtype=torch.bool)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
