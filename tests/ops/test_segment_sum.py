"""segment_sum: every backend is the reference, and sequences do not mix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sma.errors import ShapeError
from sma.ops import using
from sma.ops.segment_sum import OP, segment_sum
from sma.routing import Packed
from sma.testing import OpCase, OpSuite
from tests.ops.packed_cases import masks, numbers


class TestSegmentSum(OpSuite):
    op = OP

    def cases(self) -> Iterator[OpCase]:
        for name, mask in masks():
            yield OpCase(name, (numbers(int(mask.sum()), 3), Packed.from_mask(mask).cu_seqlens))


@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("torch_scatter", marks=pytest.mark.scatter)])
def test_a_poisoned_sequence_stays_by_itself(name: str) -> None:
    x = numbers(5, 2)
    x[2] = float("nan")
    with using(name):
        sums = segment_sum(x, torch.tensor([0, 2, 2, 3, 5]))
    assert sums.isnan().tolist() == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert torch.equal(sums[1], torch.zeros(2, dtype=torch.float64))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="cu_seqlens"):
        segment_sum(torch.randn(3, 2), torch.zeros(0, dtype=torch.int64))
