"""extract: every backend is the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sma.errors import ShapeError
from sma.ops.extract import OP, extract
from sma.routing import Packed
from sma.testing import OpCase, OpSuite
from tests.ops.packed_cases import masks, numbers


class TestExtract(OpSuite):
    op = OP
    moves_data = True

    def cases(self) -> Iterator[OpCase]:
        for name, mask in masks():
            yield OpCase(name, (numbers(int(mask.sum()), 3), Packed.from_mask(mask)))
        yield OpCase("two features", (numbers(3, 2, 2), Packed.from_mask(torch.tensor([[True, False, True, True]]))))


def test_wrong_shapes_are_refused() -> None:
    packed = Packed.from_mask(torch.tensor([[True, False, True]]))
    with pytest.raises(ShapeError, match="extract: h must have one row for each of 2 active tokens, got 3"):
        extract(torch.randn(3, 2), packed)
