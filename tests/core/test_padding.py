"""Rows of any padding move to the left and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import ShapeError
from sma.padding import Alignment, valid_of


@given(rows=st.integers(0, 4), length=st.integers(0, 9), features=st.integers(0, 2), seed=st.integers(0, 1000))
def test_any_mask_moves_left_and_back(rows: int, length: int, features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(rows, length, generator=generator) < 0.6
    x = torch.randn(rows, length, *[2] * features, generator=generator)
    alignment = Alignment.of(valid, (rows, length))
    aligned = alignment.align(x)
    assert torch.equal(alignment.restore(aligned), x)
    kept = valid_of(alignment.lengths, aligned)
    assert torch.equal(alignment.align(valid), kept)
    for b in range(rows):
        assert torch.equal(aligned[b, kept[b]], x[b, valid[b]]), "the real tokens, in order"


def test_what_needs_no_move_is_not_moved() -> None:
    x = torch.randn(2, 3)
    full = Alignment.of(torch.ones(2, 3, dtype=torch.bool), (2, 3))
    assert full == Alignment(None, None) == Alignment.of(None, (2, 3))
    assert full.align(x) is x
    right = Alignment.of(torch.tensor([[True, True, False], [False] * 3]), (2, 3))
    assert right.order is None
    assert right.lengths.tolist() == [2, 0]
    assert right.align(x) is x


@pytest.mark.parametrize(
    "valid", [torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
)
def test_masks_that_do_not_fit_are_refused(valid: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"valid: must be bool of shape \(2, 3\), got"):
        Alignment.of(valid, (2, 3))
